"""In which form a client wants its answers: JSON or numpy's npz, which outputs, whole or their largest numbers only.

`?outputs=a,b` names outputs of the model, and answers of its post-processing; `?top=5` shortens outputs to their
largest numbers along the last axis, with the positions of these; `Accept: application/x-npz` gets arrays by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Literal, NamedTuple
from urllib.parse import parse_qsl

import numpy as np

from leanserve.codecs.postprocess.chain import PostChain
from leanserve.codecs.postprocess.columns import WHOLE, Columns, best, together
from leanserve.codecs.tensors import clip
from leanserve.contracts import Array, Arrays, Json, ModelSpec, Place, Placement
from leanserve.errors import BadInput
from leanserve.http.messages import Request
from leanserve.texts import KINDS, of_fixed_width

NPZ = "application/x-npz"
OUTPUTS, TOP = "outputs", "top"
MOST_TOP = 1000


class AnswerWish(NamedTuple):
    """What a request asks of its answers. No `names`: what is answered by default. `top`: largest numbers of a list."""

    names: tuple[str, ...] = ()
    top: int | None = None
    form: Literal["json", "npz"] = "json"


DEFAULT_WISH = AnswerWish()


class OutputRows(NamedTuple):
    """What a variant of this spec gave for some rows, and where these lie in what was sent (empty: unknown)."""

    outputs: Arrays
    spec: ModelSpec
    places: Sequence[Place]


class AnswerForms:
    """The forms in which one service answers."""

    def __init__(self, spec: ModelSpec, chain: PostChain) -> None:
        self._outputs = tuple(item.name for item in spec.outputs)
        self._chain = chain
        self.is_costly = chain.costly
        """Whether making an answer takes longer than its size tells."""

    @property
    def names(self) -> tuple[str, ...]:
        """All that may be asked for."""
        return (*self._outputs, *self._chain.written)

    def wished(self, request: Request) -> AnswerWish:
        """What a request asks for.

        Raises:
            BadInput: a parameter that is not known, a name that is not, or a number that is none.
        """
        accept = request.headers.get(b"accept", b"")
        if not request.query and b"npz" not in accept:
            return DEFAULT_WISH
        asked = _parameters(request.query)
        names = tuple(dict.fromkeys(name for text in asked.get(OUTPUTS, ()) for name in self._named(text)))
        top = [_count(text) for text in asked.get(TOP, ())][-1:]
        if top and not set(self._outputs) & set(names or self._chain.ends or self._outputs):
            known = ", ".join(self._outputs)
            raise BadInput(f"{TOP} shortens outputs of the model, and none is asked for; name one ({OUTPUTS}): {known}")
        return AnswerWish(names, top[0] if top else None, "npz" if NPZ.encode() in accept.lower() else "json")

    def tells_classes(self, wish: AnswerWish) -> bool:
        """Whether the codec answers by itself: no post-processing and no output is asked for by name, or as arrays."""
        return not self._chain.written and not wish.names and wish.form == "json"

    def columns(self, rows: OutputRows, wish: AnswerWish) -> dict[str, Columns]:
        """The answers to rows, by name.

        Raises:
            BackendFailed: the outputs hold what post-processing cannot read.
        """
        names = wish.names or self._chain.ends or self._outputs
        pairs = zip(rows.spec.outputs, rows.outputs, strict=True)
        answers = {item.name: _shortened(array, wish.top) for item, array in pairs if item.name in names}
        written = [name for name in names if name in self._chain.written]
        images = [place for place in rows.places if isinstance(place, Placement)]
        return answers | self._chain.answers(rows.outputs, rows.spec, images, written)

    def told(self, rows: OutputRows, wish: AnswerWish) -> list[dict[str, Json]]:
        """The answers to rows, as JSON with numpy's numbers.

        Raises:
            BackendFailed: a number is not finite, which JSON does not have.
        """
        count = len(rows.outputs[0])
        told: list[dict[str, Json]] = [{} for _ in range(count)]
        for name, columns in self.columns(rows, wish).items():
            for row, answer in zip(told, columns.of_rows(count), strict=True):
                if name in self._outputs:
                    row.setdefault("outputs", {})[name] = answer
                else:
                    row[name] = answer
        return told

    def _named(self, text: str) -> list[str]:
        names = [text] if text in self.names else text.split(",")
        for name in names:
            if name not in self.names:
                raise BadInput(f"{OUTPUTS}: there is no {clip(name)}; there are {', '.join(self.names)}")
        return names


def archive(parts: Sequence[Mapping[str, Columns]], groups: Sequence[Sequence[int]], places: Sequence[Place]) -> bytes:
    """The answers to all parts of a request as one `.npz` file; `groups` are the rows of each part.

    Raises:
        BadInput: rows are of different shape, which no array can hold.
    """
    arrays: dict[str, Array] = {}
    for name in parts[0]:
        arrays |= together([part[name] for part in parts], groups).named(name)
    for name in places[0]._fields if places else ():
        prefix = "image." if isinstance(places[0], Placement) else ""
        arrays[prefix + name] = np.array([getattr(place, name) for place in places])
    stream = BytesIO()
    # Texts have a fixed width in it: as objects they would be pickled.
    np.savez(stream, allow_pickle=False, **{name: of_fixed_width(array) for name, array in arrays.items()})
    return stream.getvalue()


def _shortened(array: Array, top: int | None) -> Columns:
    if top is None or array.ndim < 2 or array.dtype.kind in KINDS:
        return Columns({WHOLE: array})
    index, value = best(array, top)
    return Columns({"index": index, "value": value})


def _parameters(query: bytes) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, text in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
        if name not in {OUTPUTS, TOP}:
            raise BadInput(f"unknown parameter {clip(name)} in the address; there are {OUTPUTS} and {TOP}")
        found.setdefault(name, []).append(text)
    return found


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 1 <= int(text) <= MOST_TOP):
        raise BadInput(f"{TOP} is a number from 1 to {MOST_TOP}, not {clip(text)}")
    return int(text)
