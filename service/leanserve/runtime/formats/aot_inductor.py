"""Packages of TorchInductor: machine code and weights in one file, opened in milliseconds, run without a compiler.

The code was compiled by a pass for this instruction set and this torch, which are part of the artifact's key. It is the
one format with code in it (docs/decisions/026-packages-of-machine-code.md).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from leanserve.contracts import Backend, ModelSize, ModelSpec, Share, TorchModel

if TYPE_CHECKING:
    from torch import nn

PACKAGE = "model.pt2"


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A package at `path`; `size` is that of the module it was compiled from, and unknown when it is loaded."""

    format: ClassVar[str] = "aot_inductor"
    path: Path
    spec: ModelSpec
    size: ModelSize | None = None


class AotInductorFormat:
    """A `contracts.Format`."""

    name = PackagedModel.format
    libraries = ("torch",)
    runtime_module = "torch"
    self_contained = False
    places_threads = False
    in_memory = False

    def save(self, model: PackagedModel, folder: Path) -> None:
        shutil.copyfile(model.path, folder / PACKAGE)

    def load(self, folder: Path, spec: ModelSpec, rebuild: Callable[[], nn.Module]) -> PackagedModel:  # noqa: ARG002
        """The package is read when it is opened."""
        return PackagedModel(folder / PACKAGE, spec)

    def size(self, model: PackagedModel) -> ModelSize:
        return model.size or ModelSize(0, 0)

    def open(self, model: PackagedModel, share: Share) -> Backend:
        """Its code is for the CPU; its threads are torch's, which has one setting of them for the process."""
        from leanserve.runtime.backends.pytorch import TorchBackend
        from leanserve.runtime.formats.packaged_module import PackagedModule

        return TorchBackend(TorchModel(PackagedModule(model.path), model.spec), share.threads)


FORMAT = AotInductorFormat()
