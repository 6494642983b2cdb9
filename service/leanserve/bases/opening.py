"""From what the config declares to the `Base` that everything else works with; also in another process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from leanserve.bases import time_limit
from leanserve.bases.apart import described_apart
from leanserve.bases.checkpoints import file_digest
from leanserve.bases.datasets.arrays import shapes_told
from leanserve.bases.datasets.opening import open_rows
from leanserve.bases.datasets.refitted import RefittedRows
from leanserve.bases.description import Description, remembered
from leanserve.bases.loaded import LoadedBase, Rows
from leanserve.bases.origin import Origin, Source, source_of
from leanserve.bases.scores.opening import open_score
from leanserve.bases.shipped import BaseModule, ModuleRows, ModuleSource
from leanserve.bases.sources.python_module import PythonSource
from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.arrays import ArrayCodec
from leanserve.codecs.audio import AudioCodec
from leanserve.codecs.image_limits import DEFAULT_LIMITS, ImageLimits
from leanserve.codecs.images import ImageCodec
from leanserve.codecs.text import TextCodec
from leanserve.config.base_section import (
    BroughtBase,
    OnnxBase,
    PythonBase,
    ShippedBase,
    TorchExportBase,
)
from leanserve.config.data_section import ArrayFileData, TableData
from leanserve.contracts import Codec, Model, ModelSpec, RowsTogether, TorchModel
from leanserve.errors import ConfigError
from leanserve.scoring import ACCURACY, Scoring, score_of

if TYPE_CHECKING:
    from torch import nn


BATCHED: Final[Mapping[RowsTogether, str]] = {
    "one_length": "only rows of equal length share a batch",
    "one": "every row has a batch to itself",
}
"""What to know of a speed that was measured so."""


Where = Literal["here", "apart"]
"""Whether a model of which nothing is remembered is looked at in this process, or in one of its own."""


def reopen_base(origin: str) -> LoadedBase:
    """The base of which `Base.origin` is this, in another process."""
    return open_base(Origin.model_validate_json(origin))


def reopen_module(origin: str, spec: ModelSpec) -> nn.Module:
    """The torch module alone of the base of which `Base.origin` and `Base.spec` are these, in another process.

    Its rows, which may be many files, are not looked at.

    Raises:
        ConfigError: the model is not the one that was opened there.
    """
    known = Origin.model_validate_json(origin)
    source = source_of(known)
    if known.fingerprint not in {None, source.fingerprint()}:
        raise ConfigError("base: its files have changed since the service started; start it again")
    return cast("TorchModel", source.model(spec)).module


def open_base(origin: Origin, where: Where = "here") -> LoadedBase:
    """The base that the config declares; `where` says in which process a model is looked at that is not known yet.

    Raises:
        ConfigError: it cannot be opened; the text names the key. Or it is not the one that was opened before.
    """
    source = source_of(origin)
    with _in_time(origin.base):
        fingerprint = source.fingerprint()
    describe = source.describe
    # To tell their fingerprint, these have been loaded already, or nothing heavy is.
    if where == "apart" and not isinstance(source, PythonSource | ModuleSource):
        describe = partial(described_apart, origin)
    with _in_time(origin.base):
        description = remembered(origin.cache, _description_key(origin, fingerprint), describe)
    spec = description.spec()
    codec = codec_of(description, spec, origin.images)
    rows, score = _rows_and_score(origin, source, description, codec_of(description, spec))
    # The tokenizer and the formats decide answers through the rows alone, whose digest knows them by content.
    told = description.model_dump_json(
        exclude={
            "name": True,
            "text": {"tokenizer"},
            "image": {"formats"},
            "audio": {"formats"},
            "outputs": {"__all__": {"evidence"}},
        }
    )
    digest = hashlib.sha256(f"{fingerprint} {told} {rows.digest}".encode()).hexdigest()
    if origin.digest not in {None, digest}:
        raise ConfigError("base, data: their files have changed since the build began; start it again")

    def load() -> Model:
        model = source.model(spec)
        if source.fingerprint() != fingerprint:
            raise ConfigError("base: its files have changed since it was opened; start again")
        return model

    return LoadedBase(
        name=description.name,
        spec=_bounded(spec, codec),
        codec=codec,
        origin=origin.model_copy(update={"fingerprint": fingerprint, "digest": digest}).model_dump_json(),
        digest=digest,
        caveats=_caveats(origin, description),
        load=load,
        rows=rows,
        scored_by=score,
        make_codec=partial(codec_of, description, images=origin.images),
        make_rows=partial(_rows_for, origin, rows, description),
        outputs=description.outputs,
    )


def _in_time(base: ShippedBase | BroughtBase) -> AbstractContextManager[None]:
    """Code and programs of the user's own have a time limit; models of libraries may be downloaded first."""
    if isinstance(base, PythonBase):
        return time_limit.time_limit(time_limit.TRIAL_S, f"base.python: to make and run {base.python}")
    if isinstance(base, TorchExportBase):
        return time_limit.time_limit(time_limit.TRIAL_S, f"base.torch_export: to look at {base.torch_export}")
    return nullcontext()


def _description_key(origin: Origin, fingerprint: str) -> str:
    """A hash of all that decides what is told of a model: class names may be in a file, and paths are told whole."""
    total = hashlib.sha256(f"{fingerprint} {origin.folder.resolve()} {origin.base.model_dump_json()}".encode())
    labels = origin.base.labels if isinstance(origin.base, BroughtBase) else None
    if isinstance(labels, Path):
        total.update(file_digest(origin.folder / labels).encode())
    if isinstance(origin.base, OnnxBase) and isinstance(origin.data, ArrayFileData):
        total.update(shapes_told(origin.data, origin.folder).encode())
    if isinstance(origin.base, OnnxBase) and isinstance(origin.data, TableData):
        total.update(origin.data.model_dump_json().encode())
    return total.hexdigest()


def _caveats(origin: Origin, description: Description) -> tuple[str, ...]:
    """What the model itself told, which rows share no batch, and whether the rows are real."""
    apart = (BATCHED[description.rows],) if description.rows in BATCHED else ()
    synthetic = ("synthetic data",) if origin.data and origin.data.kind == "synthetic" else ()
    return description.caveats + apart + synthetic


def _bounded(spec: ModelSpec, codec: Codec) -> ModelSpec:
    """With the values that tokens may have: clients of the tensor protocol send ids of their own."""
    if not isinstance(codec, TextCodec):
        return spec
    return replace(spec, inputs=tuple(replace(item, values=codec.values_of(item)) for item in spec.inputs))


def codec_of(description: Description, spec: ModelSpec, images: ImageLimits = DEFAULT_LIMITS) -> Codec:
    """What turns requests into the inputs of a model of this spec, and its outputs into answers."""
    answers = AnswerEncoder(spec)
    if description.image is not None:
        return ImageCodec(answers=answers, limits=images, **(description.image.model_dump() | _sizes_of(spec)))
    if description.audio is not None:
        audio = description.audio
        return AudioCodec(audio.rate, answers, audio.hop, audio.formats, audio.max_seconds)
    if description.text is not None:
        return TextCodec(description.text.tokenizer, min(description.text.max_length, spec.max_length), answers)
    return ArrayCodec(answers)


def _sizes_of(spec: ModelSpec) -> dict[str, Any]:
    """(width, height) of the images that a model takes, and the bounds of those sides that the spec leaves open."""
    height, width = spec.inputs[0].shape[-2:]
    return {"size": (width, height), "max_side": spec.max_length, "step": spec.step, "least": spec.least}


def _rows_for(origin: Origin, rows: Rows, description: Description, spec: ModelSpec) -> Rows:
    """The rows of a base for a model whose passes have changed what it takes."""
    if origin.data is None:
        return RefittedRows(rows, spec)
    own = _own_labels(origin, description)
    return open_rows(origin.data, description, codec_of(description, spec), origin.folder, spec, own_labels=own)


def _own_labels(origin: Origin, description: Description) -> bool:
    """Whether labels are of a form that only the configured score understands; names of classes are always read."""
    return origin.score is not None and not description.labels


def _rows_and_score(origin: Origin, source: Source, description: Description, codec: Codec) -> tuple[Rows, Scoring]:
    own = source.module if isinstance(source, ModuleSource) else None
    spec = description.spec()
    declared = None if origin.score is None else open_score(origin.score, spec, origin.folder)
    if own is not None and origin.data is None:
        return ModuleRows(own), declared or _own_score(own)
    if origin.data is None:
        raise ConfigError(
            "data: this base comes without rows, and the report, the gate and calibration need some; add `data:` with "
            "images, arrays or texts like those it will be asked about (synthetic: 64 for a first look at speed)"
        )
    labels = _own_labels(origin, description)
    rows = open_rows(origin.data, description, codec, origin.folder, own_labels=labels)
    return rows, declared or (score_of(spec, rows.unit) if own is None else _own_score(own))


def _own_score(module: BaseModule) -> Scoring:
    """That of a shipped base, whose source is part of its fingerprint."""
    return Scoring(ACCURACY if module.LABELS else "score", module.score)
