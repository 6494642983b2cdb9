"""The bases that come with the service: a plain module in `models/` is read into the parts of a `Base`.

Modules in `models/` never import the service, so that a data scientist can write and run one alone; this file is the
only bridge. Importing one imports neither torch nor scikit-learn; only `build`, `data` and `score` may.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, cast

from leanserve.bases.description import Description, Tensor
from leanserve.bases.inputs import image_input
from leanserve.bases.meanings import settled
from leanserve.config.base_section import ImageFiles, ImageInput, ShippedBase, TextInput, TimmBase
from leanserve.contracts import Array, ArrayData, Arrays, Data, Json, ModelSpec, Split, TorchModel
from leanserve.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


class Shipped(NamedTuple):
    """Where a shipped base is declared, and the extra that brings what it needs."""

    module: str | None
    extra: str | None = None
    has_data: bool = True
    timm: str | None = None
    """Instead of a module: timm's name of a model for which the user says where the weights come from."""


SHIPPED: Final[Mapping[str, Shipped]] = {
    "digits": Shipped("leanserve_models.digits"),
    "minilm": Shipped("leanserve_models.minilm", "text"),
    "efficientnet_lite0": Shipped("leanserve_models.efficientnet_lite0", "vision"),
    "resnet50": Shipped(None, "vision", has_data=False, timm="resnet50.a1_in1k"),
}
"""By the name in the config."""


class BaseModule(Protocol):
    """What a module in `models/` declares; `models/__init__.py` explains each."""

    __file__: str
    INPUTS: tuple[Mapping[str, Json], ...]
    OUTPUTS: tuple[Mapping[str, Json], ...]
    LABELS: tuple[str, ...]
    FILES: tuple[str, ...]
    LIBRARIES: tuple[str, ...]

    def build(self) -> nn.Module: ...

    def data(self, split: Split, n: int | None) -> Data | tuple[Arrays, Array | None]: ...

    def score(self, outputs: Arrays, labels: Array) -> float: ...


def shipped_module(name: str) -> BaseModule:
    """The module of a shipped base.

    Raises:
        ConfigError: there is no such base, or the extra that brings its weights is not installed.
    """
    if name not in SHIPPED:
        raise ConfigError(f"unknown base {name!r}: the shipped bases are {', '.join(sorted(SHIPPED))}")
    where = SHIPPED[name]
    if where.module is None:
        raise ConfigError(f"the base '{name}' is a model of timm and has no module")
    try:
        return cast(BaseModule, import_module(where.module))
    except ModuleNotFoundError as error:
        if where.extra is None:
            raise
        raise ConfigError(
            f"the base '{name}' needs the extra '{where.extra}': pip install 'leanserve[{where.extra}]'"
        ) from error


def borrowed(base: ShippedBase) -> TimmBase | None:
    """What a shipped base stands for whose architecture and weights are timm's; `None` for the others.

    Raises:
        ConfigError: the weights are not chosen.
    """
    where = SHIPPED.get(base.shipped)
    if where is None or where.timm is None:
        return None
    if base.weights is None:
        raise ConfigError(
            f"base.weights: the base '{base.shipped}' comes without weights; write base: {{shipped: {base.shipped}, "
            "weights: ...} with hub (downloaded once), a file, or random (speed work only)"
        )
    return TimmBase(
        timm=where.timm, weights=base.weights, weights_key=base.weights_key, name=base.shipped, image=base.image
    )


@dataclass(frozen=True)
class ModuleSource:
    """A `bases.origin.Source`: model, description, own rows and score of a module in `models/`."""

    name: str
    module: BaseModule
    files: ImageFiles | None = None
    """Of images, as the config wants them read."""

    def fingerprint(self) -> str:
        """sha256 (hex) over the module's source, its files and the versions of its libraries."""
        source = Path(self.module.__file__)
        total = hashlib.sha256()
        for name in (source.name, *self.module.FILES):
            content = (source.parent / name).read_bytes()
            total.update(f"{name} {len(content)}\n".encode() + content)
        for library in self.module.LIBRARIES:
            total.update(f"{library}=={metadata.version(library)}\n".encode())
        return total.hexdigest()

    def describe(self) -> Description:
        image, text = (getattr(self.module, name, None) for name in ("IMAGE", "TEXT"))
        if image is None and self.files is not None:
            raise ConfigError(f"base.image: the base '{self.name}' takes no images")
        given = settled([Tensor.model_validate(item) for item in self.module.OUTPUTS], self.module.LABELS)
        return Description(
            name=self.name,
            inputs=tuple(Tensor.model_validate(item) for item in self.module.INPUTS),
            outputs=given.tensors,
            labels=self.module.LABELS,
            labelled=given.labelled,
            image=None if image is None else image_input(self.files, lambda: ImageInput.model_validate(image)),
            text=None if text is None else TextInput.model_validate(text),
            max_length=512 if text is None else text["max_length"],
        )

    def model(self, spec: ModelSpec) -> TorchModel:
        return TorchModel(self.module.build(), spec)


@dataclass(frozen=True)
class ModuleRows:
    """A `bases.loaded.Rows`: the data that a module brings; its digest is part of the module's."""

    module: BaseModule

    @cached_property
    def digest(self) -> str:
        return "own"

    @property
    def unit(self) -> int:
        return int(getattr(self.module, "UNIT", 1))

    def split(self, split: Split, n: int | None) -> Data:
        found = self.module.data(split, n)
        return ArrayData(*found) if isinstance(found, tuple) else found
