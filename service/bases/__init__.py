"""Where a base comes from: a plain module in `models/` is read into the `Base` that the rest of the service knows.

Modules in `models/` never import the service, so that a data scientist can write and run one alone; this file is the
only bridge. Loading a base and its digest import neither torch nor scikit-learn, which is what makes a start from the
cache quick; only `build`, `data` and `score` may.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, cast

from service.api.codecs.image import ImageCodec
from service.contracts import Array, ArrayData, Arrays, Field, InputSpec, Json, Split
from service.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

SHIPPED: Final[Mapping[str, str]] = {"digits": "models.digits"}
"""Name in the config -> module of each base that comes with the service."""


class BaseModule(Protocol):
    """What a module in `models/` declares; `models/__init__.py` explains each."""

    __file__: str
    INPUTS: tuple[Mapping[str, Json], ...]
    OUTPUTS: tuple[Mapping[str, Json], ...]
    LABELS: tuple[str, ...]
    IMAGE: Mapping[str, Json]
    FILES: tuple[str, ...]
    LIBRARIES: tuple[str, ...]

    def build(self) -> nn.Module: ...

    def data(self, split: Split, n: int | None) -> tuple[Arrays, Array | None]: ...

    def score(self, outputs: Arrays, labels: Array) -> float: ...


@dataclass(frozen=True)
class ModuleBase:
    """A `Base` read from a module."""

    name: str
    module: BaseModule
    spec: InputSpec
    codec: ImageCodec

    @property
    def origin(self) -> str:
        return self.name

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over the module's source, its files and the versions of its libraries."""
        source = Path(self.module.__file__)
        total = hashlib.sha256()
        for name in (source.name, *self.module.FILES):
            content = (source.parent / name).read_bytes()
            total.update(f"{name} {len(content)}\n".encode() + content)
        for library in self.module.LIBRARIES:
            total.update(f"{library}=={metadata.version(library)}\n".encode())
        return total.hexdigest()

    def build(self) -> nn.Module:
        return self.module.build()

    def data(self, split: Split, n: int | None = None) -> ArrayData:
        return ArrayData(*self.module.data(split, n))

    def score(self, outputs: Arrays, labels: Array) -> float:
        return self.module.score(outputs, labels)


def reopen_base(origin: str) -> ModuleBase:
    """The base of which `Base.origin` is this, in another process."""
    return load_base(origin)


@cache
def load_base(name: str) -> ModuleBase:
    """The shipped base of this name.

    Raises:
        ConfigError: there is no such base; the text lists those there are.
    """
    if name not in SHIPPED:
        raise ConfigError(f"unknown base {name!r}: the shipped bases are {', '.join(sorted(SHIPPED))}")
    return read_module(name, cast(BaseModule, import_module(SHIPPED[name])))


def read_module(name: str, module: BaseModule) -> ModuleBase:
    """A base from a module's declarations."""
    spec = InputSpec(
        fields=tuple(Field(**declared) for declared in module.INPUTS),
        outputs=tuple(Field(**declared) for declared in module.OUTPUTS),
        labels=module.LABELS,
    )
    return ModuleBase(name, module, spec, ImageCodec(labels=module.LABELS, **module.IMAGE))
