"""Arrays in: the codec of models that take neither images nor texts, but tensors as they are.

Bodies:
- `application/json`: `{"inputs": nested lists}` for a model of one input, `{"inputs": {"name": nested lists, ...}}` for
  several. One row, or a list of rows: the depth of the lists tells.
- `application/x-npy` for one input, `application/x-npz` (arrays by their names) for any number: numpy's files.
- `application/octet-stream` for one input of numbers of fixed shape: its rows one after the other, little-endian.

Rows may differ in length along the one dynamic axis of an input: shorter ones are padded. Inputs with one dynamic axis
each (token ids and their mask) have the same length in the same row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np

from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.json_body import inputs_of
from leanserve.codecs.json_weight import json_seconds
from leanserve.codecs.nested import array_of, refuse, sizes_of
from leanserve.codecs.numpy_files import array_in, arrays_in, inflated_size
from leanserve.codecs.tensors import MOST_TEXTS, clip, refuse_nul
from leanserve.contracts import Array, Arrays, Decoded, Json, TensorSpec, Weighed
from leanserve.errors import BadInput, BodyTooLarge, UnsupportedMediaType
from leanserve.texts import STRING, array_of_texts

JSON = "application/json"
NPY, NPZ = "application/x-npy", "application/x-npz"
OCTETS = "application/octet-stream"
BYTE_S = 4e-9
"""Seconds to inflate, check and convert a byte of an array."""


class Input(NamedTuple):
    """One input as a batch; `lengths` is per row that of its dynamic axis, if it has exactly one."""

    batch: Array
    many: bool
    lengths: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class ArrayCodec:
    """Codec of a base with any inputs. `max_elements` bounds each of them, padding included."""

    answers: AnswerEncoder
    max_elements: int = 2**24

    @property
    def fields(self) -> tuple[TensorSpec, ...]:
        """The inputs of the model, in its order."""
        return self.answers.spec.inputs

    @property
    def media_types(self) -> tuple[str, ...]:
        if len(self.fields) > 1:
            return JSON, NPZ
        [item] = self.fields
        return (JSON, NPZ, NPY) if None in item.shape or item.dtype == STRING else (JSON, NPZ, NPY, OCTETS)

    def prepare(self, media_type: str, body: bytes) -> Weighed[Decoded]:
        """What decoding takes, by bytes and by what they inflate to. Raises as `decode`."""
        kind = media_type.partition(";")[0].strip().lower()
        if kind not in self.media_types:
            raise UnsupportedMediaType(f"content type {media_type!r} is none of {', '.join(self.media_types)}")
        if kind == JSON:
            seconds = json_seconds(body)
        else:
            seconds = (inflated_size(body, self.max_elements) if kind == NPZ else len(body)) * BYTE_S
        return Weighed(seconds, partial(self._decoded, kind, body))

    def decode(self, media_type: str, body: bytes) -> Decoded:
        """Body -> the model's inputs.

        Raises:
            BadInput: the body is not what its media type says, or does not fit the model; the text says where.
            BodyTooLarge: an input has more than `max_elements`.
            UnsupportedMediaType: none of `media_types`; parameters such as `charset` are ignored.
        """
        return self.prepare(media_type, body).finish()

    def _decoded(self, kind: str, body: bytes) -> Decoded:
        if kind == JSON:
            given = self._by_name(inputs_of(body))
            return _joined(self.fields, [self._parsed(item, value, where) for item, value, where in given])
        if kind == OCTETS:
            return self._rows_of_bytes(body)
        arrays = arrays_in(body, self.max_elements) if kind == NPZ else array_in(body, self.max_elements)
        named = self._by_name(arrays)
        return _joined(self.fields, [self._checked(item, array, where) for item, array, where in named])

    def encode(self, outputs: Arrays, most: int | None = None) -> list[dict[str, Json]]:
        """One answer per row, see `leanserve.codecs.answers`."""
        return self.answers.encode(outputs, most)

    def _by_name(self, inputs: Any) -> list[tuple[TensorSpec, Any, str]]:
        """Each field with what was sent for it and where that stands."""
        names = [item.name for item in self.fields]
        if not isinstance(inputs, Mapping):
            if len(self.fields) > 1:
                raise BadInput(f"inputs: the model takes several inputs, by their names: {', '.join(names)}")
            return [(self.fields[0], inputs, "inputs")]
        for name in inputs:
            if name not in names:
                raise BadInput(f"inputs: unknown input {clip(name)}; the model takes {', '.join(names)}")
        for name in names:
            if name not in inputs:
                raise BadInput(f"inputs: the input {name!r} is missing")
        return [(item, inputs[item.name], f"inputs.{item.name}") for item in self.fields]

    def _parsed(self, item: TensorSpec, value: Json, where: str) -> Input:
        """Nested lists as one input."""
        sizes, axes = sizes_of(value), len(item.shape)
        if len(sizes) not in {axes, axes + 1} or 0 in sizes:
            found = "an empty list" if 0 in sizes else f"{len(sizes)} levels of lists" if sizes else clip(value)
            raise BadInput(f"{where}: expected one row of shape {_shown(item)} or a list of rows, got {found}")
        many, dtype = len(sizes) > axes, item.array_dtype
        rows = value if many else [value]
        shape = (len(rows), *_fitting(item, sizes_of(rows[0])))
        self._bound(item, shape)
        whole = array_of(rows, dtype, shape)
        if whole is not None:
            return Input(whole, many, _lengths(item, [whole[0]] * len(rows)))
        return self._padded(item, [_row(item, row, f"{where}[{i}]" if many else where) for i, row in enumerate(rows)])

    def _padded(self, item: TensorSpec, rows: Sequence[Array]) -> Input:
        """Rows that are right in themselves but differ in size."""
        if item.shape.count(None) > 1:
            differing = next((row for row in rows if row.shape != rows[0].shape), rows[0])
            raise BadInput(
                f"input {item.name!r}: rows of one request must have the same shape, got {list(rows[0].shape)} and "
                f"{list(differing.shape)}"
            )
        shape = tuple(map(max, *(row.shape for row in rows)))
        self._bound(item, (len(rows), *shape))
        batch = np.full((len(rows), *shape), item.filler, item.array_dtype)
        for place, row in zip(batch, rows, strict=True):
            place[tuple(slice(0, size) for size in row.shape)] = row
        return Input(batch, lengths=_lengths(item, rows), many=True)

    def _checked(self, item: TensorSpec, array: Array, where: str) -> Input:
        """An array from a file as one input."""
        axes = len(item.shape)
        if array.ndim not in {axes, axes + 1} or 0 in array.shape:
            raise BadInput(
                f"{where}: expected one row of shape {_shown(item)} or several, got an array of {list(array.shape)}"
            )
        batch = array if array.ndim > axes else array[None]
        if _fitting(item, batch.shape[1:]) != batch.shape[1:]:
            raise BadInput(f"{where}: expected rows of shape {_shown(item)}, got {list(batch.shape[1:])}")
        self._bound(item, batch.shape)
        return Input(_converted(item, batch, where), array.ndim > axes, _lengths(item, [batch[0]] * len(batch)))

    def _rows_of_bytes(self, body: bytes) -> Decoded:
        item = self.fields[0]
        shape = tuple(size for size in item.shape if size is not None)
        dtype = np.dtype(item.dtype).newbyteorder("<")
        rows, rest = divmod(len(body), prod(shape) * dtype.itemsize)
        if rest or not rows:
            raise BadInput(
                f"the body has {len(body)} bytes, not a whole number of rows of {prod(shape) * dtype.itemsize} "
                f"({item.dtype} of shape {_shown(item)}, little-endian)"
            )
        self._bound(item, (rows, *shape))
        if dtype.kind == "b" and np.frombuffer(body, np.uint8).max() > 1:
            raise BadInput("the body: a boolean is the byte 0 or 1")
        batch = np.frombuffer(body, dtype).reshape(rows, *shape)
        return Decoded((_converted(item, batch, "the body"),), many=rows > 1)

    def _bound(self, item: TensorSpec, shape: Sequence[int]) -> None:
        most = min(self.max_elements, MOST_TEXTS) if item.dtype == STRING else self.max_elements
        if prod(shape) > most:
            raise BodyTooLarge(
                f"input {item.name!r} has {prod(shape)} elements, padding included; at most {most} are taken"
            )


def _row(item: TensorSpec, row: Json, where: str) -> Array:
    sizes, dtype = sizes_of(row), item.array_dtype
    if len(sizes) == len(item.shape) and 0 not in sizes:
        fitting = _fitting(item, sizes)
        array = array_of(row, dtype, fitting)
        if array is not None:
            return array
        refuse(row, dtype, fitting, where)
    raise BadInput(f"{where}: expected a row of shape {_shown(item)}, got {clip(row)}")


def _joined(fields: Sequence[TensorSpec], inputs: Sequence[Input]) -> Decoded:
    """All inputs as one request: the same rows, of the same lengths."""
    first = inputs[0]
    for item, other in zip(fields, inputs, strict=True):
        if (other.many, len(other.batch)) != (first.many, len(first.batch)):
            raise BadInput(
                f"inputs: {fields[0].name!r} is {_told(first)}, {item.name!r} is {_told(other)}; they must match"
            )
    known = [(item.name, other.lengths) for item, other in zip(fields, inputs, strict=True) if other.lengths]
    for name, lengths in known[1:]:
        if lengths != known[0][1]:
            raise BadInput(f"inputs: {known[0][0]!r} and {name!r} differ in length; in each row both must be as long")
    return Decoded(tuple(item.batch for item in inputs), first.many, known[0][1] if known else ())


def _told(given: Input) -> str:
    return f"a list of {len(given.batch)} rows" if given.many else "a single row"


def _fitting(item: TensorSpec, sizes: Sequence[int]) -> tuple[int, ...]:
    """The sizes that a row must have; what the field leaves open is taken from the row."""
    padded = (*sizes, *[1] * len(item.shape))
    return tuple(found if size is None else size for size, found in zip(item.shape, padded, strict=False))


def _lengths(item: TensorSpec, rows: Sequence[Array]) -> tuple[int, ...] | None:
    if item.shape.count(None) != 1:
        return None
    axis = item.shape.index(None)
    return tuple(row.shape[axis] for row in rows)


def _converted(item: TensorSpec, batch: Array, where: str) -> Array:
    """To the field's dtype, as JSON numbers would be: floats from any number, integers from integers in range."""
    wanted = item.array_dtype
    able = {"b": "b", "i": "iu", "u": "iu", "f": "iuf", "O": "U"}[wanted.kind]
    if batch.dtype.kind not in able:
        raise BadInput(f"{where}: the model takes {item.dtype}, got {batch.dtype}")
    if wanted.kind == "O":
        return _texts(batch, where)
    if wanted.kind in "iu":
        limits = np.iinfo(wanted)
        if int(batch.min()) < limits.min or int(batch.max()) > limits.max:
            raise BadInput(f"{where}: a number is out of the range of {wanted}")
    with np.errstate(over="ignore"):  # what overflows to infinity is refused below
        array = np.ascontiguousarray(batch, wanted)
    if wanted.kind == "f" and not np.isfinite(array).all():
        place = [int(axis) for axis in np.argwhere(~np.isfinite(array))[0]]
        raise BadInput(
            f"{where}: input {item.name!r} holds {batch[tuple(place)]} at {place}; every number must be finite and in "
            f"the range of {wanted}"
        )
    return array


def _texts(batch: Array, where: str) -> Array:
    """From numpy's texts of a fixed width, whose code points nobody has looked at."""
    texts: list[str] = batch.ravel().tolist()
    try:
        for text in texts:
            refuse_nul(text, f"{where}: a text")
            text.encode()
    except ValueError as error:
        raise BadInput(f"{where}: it holds what is no text: {error}") from None
    return array_of_texts(texts, batch.shape)


def _shown(item: TensorSpec) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in item.shape) + "]"
