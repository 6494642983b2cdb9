"""Where a base comes from: what is declared of it, for this process or another, and what reads models of its form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol, Self

from leanserve.bases.description import Description
from leanserve.bases.shipped import ModuleSource, borrowed, shipped_module
from leanserve.bases.sources.exported_program import ExportedSource
from leanserve.bases.sources.onnx_file import OnnxSource
from leanserve.bases.sources.python_module import PythonSource
from leanserve.bases.sources.timm_model import TimmSource
from leanserve.bases.sources.transformers_model import TransformersSource
from leanserve.codecs.image_limits import DEFAULT_LIMITS, ImageLimits
from leanserve.config.base_section import (
    AnyBase,
    BroughtBase,
    OnnxBase,
    PythonBase,
    ShippedBase,
    TimmBase,
    TorchExportBase,
    TransformersBase,
)
from leanserve.config.data_section import AnyData, ArrayFileData, TableData
from leanserve.config.score_section import AnyScore
from leanserve.config.section import Section
from leanserve.contracts import Model, ModelSpec
from leanserve.errors import ConfigError


class Origin(Section):
    """All it takes to open a base, here or in another process."""

    base: AnyBase
    data: AnyData | None = None
    score: AnyScore | None = None
    folder: Path = Path()
    """To which the paths in both are relative: that of the config file."""
    images: ImageLimits = DEFAULT_LIMITS
    """Of requests; the base's own rows are its owner's."""
    cache: Path | None = None
    """Where descriptions are remembered; `None`: nowhere."""
    fingerprint: str | None = None
    """Of the model, where it is known; a python base is not made again to find it out."""
    digest: str | None = None
    """Of the base, where it was opened before; it must be the same again."""

    @classmethod
    def shipped(cls, name: str) -> Self:
        """Of a shipped base with its own data."""
        return cls(base=ShippedBase(shipped=name))


class Source(Protocol):
    """One way of bringing a model."""

    def fingerprint(self) -> str:
        """sha256 over everything that decides the model's answers. Imports nothing heavy if files tell all of it."""

    def describe(self) -> Description:
        """What the model takes and gives. May import anything and run the model.

        Raises:
            ConfigError: something cannot be found out; the text names the key that tells it.
        """

    def model(self, spec: ModelSpec) -> Model:
        """The model itself, fresh: weights loaded, eval mode, float32, on the CPU."""


SOURCES: Final[Mapping[type[BroughtBase], Callable[[Any, Path], Source]]] = {
    PythonBase: PythonSource,
    TimmBase: TimmSource,
    TransformersBase: TransformersSource,
    OnnxBase: OnnxSource,
    TorchExportBase: ExportedSource,
}
"""What reads models of each form, from what is declared and the folder to which its paths are relative."""


def source_of(origin: Origin) -> Source:
    """What reads the model of a base, with what it may know beforehand."""
    source = open_source(origin.base, origin.folder)
    if isinstance(source, PythonSource):
        return replace(source, known=origin.fingerprint)
    if isinstance(source, OnnxSource) and isinstance(origin.data, ArrayFileData | TableData):
        return replace(source, data=origin.data)
    return source


def open_source(base: ShippedBase | BroughtBase, folder: Path) -> Source:
    """What reads models of this form."""
    if isinstance(base, ShippedBase):
        if (model_of_timm := borrowed(base)) is not None:
            return TimmSource(model_of_timm, folder)
        if base.weights is not None:
            raise ConfigError(f"base.weights: the base '{base.shipped}' comes with its weights")
        return ModuleSource(base.shipped, shipped_module(base.shipped), base.image)
    return SOURCES[type(base)](base, folder)
