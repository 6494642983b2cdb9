"""A base put together from its parts: where the model comes from, where the rows come from, how answers are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from leanserve.bases.description import Tensor
from leanserve.codecs.audio import AudioCodec
from leanserve.codecs.images import ImageCodec
from leanserve.codecs.text import TextCodec
from leanserve.contracts import Array, Arrays, Batch, Codec, Data, Model, ModelSpec, Split, TorchModel
from leanserve.errors import StartupError
from leanserve.scoring import Scoring

if TYPE_CHECKING:
    from torch import nn


class Rows(Protocol):
    """The data of a base. Rows arrive as the model's inputs; splits never share any."""

    @property
    def digest(self) -> str:
        """sha256 over everything that decides the rows: content of the files, splits, seed."""

    @property
    def unit(self) -> int:
        """Consecutive rows that are scored together: 2 for pairs of texts, else 1."""

    def split(self, split: Split, n: int | None) -> Data:
        """At most the first `n` rows of a split, a multiple of `unit`; all of them for `None`."""


@dataclass(frozen=True)
class RowsOver(Rows):
    """Rows made of those of another, which decide everything; the subclass says how a split is."""

    rows: Rows

    @property
    def digest(self) -> str:
        return self.rows.digest

    @property
    def unit(self) -> int:
        return self.rows.unit


@dataclass(frozen=True)
class RowByRow:
    """`contracts.Data` whose batches have one row, whatever is asked for: none is padded, none has company."""

    data: Data

    def __len__(self) -> int:
        return len(self.data)

    def batches(self, size: int, shuffle_seed: int | None = None) -> Iterator[Batch]:
        return self.data.batches(min(size, 1), shuffle_seed)


@dataclass(frozen=True)
class LoadedBase:
    """A `contracts.Base`."""

    name: str
    spec: ModelSpec
    codec: Codec
    origin: str
    digest: str
    caveats: tuple[str, ...]
    load: Callable[[], Model]
    rows: Rows
    scored_by: Scoring
    make_codec: Callable[[ModelSpec], Codec]
    """Of a spec, however passes have changed it."""
    make_rows: Callable[[ModelSpec], Rows]
    """The same rows for a model of such a spec."""
    outputs: tuple[Tensor, ...]
    """As in the spec, with the evidence for what they mean."""

    @property
    def unit(self) -> int:
        return self.rows.unit

    def codec_for(self, spec: ModelSpec) -> Codec:
        return self.codec if spec == self.spec else self.make_codec(spec)

    def model(self) -> Model:
        return self.load()

    def torch_module(self) -> nn.Module:
        model = self.load()
        if model.format != TorchModel.format:
            raise StartupError(f"the base '{self.name}' is in the format {model.format}: no torch module")
        return cast("TorchModel", model).module

    def data(self, split: Split, n: int | None = None, spec: ModelSpec | None = None) -> Data:
        spec = spec or self.spec
        rows = self.rows if _prepared_alike(spec, self.spec) else self.make_rows(spec)
        alone = spec.rows == "one" or (spec.rows == "one_length" and self._rows_are_padded)
        found = rows.split(split, n)
        return RowByRow(found) if alone else found

    @property
    def _rows_are_padded(self) -> bool:
        """Texts and sounds to the longest of their batch, images to the largest; arrays are as long as they are."""
        codec = self.codec
        if isinstance(codec, AudioCodec):
            return codec.frame is None
        return isinstance(codec, TextCodec) or (isinstance(codec, ImageCodec) and codec.geometry.is_dynamic)

    def score(self, outputs: Arrays, labels: Array) -> float:
        return self.scored_by.function(outputs, labels)

    @property
    def scored_as(self) -> str:
        return self.scored_by.name

    @property
    def score_digest(self) -> str:
        return self.scored_by.digest


def _prepared_alike(one: ModelSpec, other: ModelSpec) -> bool:
    return (one.inputs, one.max_length) == (other.inputs, other.max_length)
