"""The format `npz` of the test that adds one: layers as numpy arrays, and a backend that multiplies them.

The test copies this file to where CONTRIBUTING's recipe puts a format. Its backend is in the same file, being short.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from leanserve.contracts import Array, Arrays, ModelSize, ModelSpec, Result, Share

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class NpzModel:
    """Weights and biases of linear layers, with a ReLU between them if `bends`."""

    format: ClassVar[str] = "npz"
    layers: tuple[tuple[Array, Array], ...]
    spec: ModelSpec
    bends: bool = False


class NpzFormat:
    """A `contracts.Format`."""

    name = NpzModel.format
    libraries = ("numpy",)
    runtime_module = "numpy"
    self_contained = True
    places_threads = False
    in_memory = True

    def save(self, model: NpzModel, folder: Path) -> None:
        """One file per layer, in a folder of their own."""
        (folder / "layers").mkdir()
        for index, (weight, bias) in enumerate(model.layers):
            np.savez(folder / "layers" / f"{index}.npz", weight=weight, bias=bias)

    def load(self, folder: Path, spec: ModelSpec, rebuild: Callable[[], nn.Module]) -> NpzModel:
        read = (np.load(path, allow_pickle=False) for path in sorted((folder / "layers").iterdir()))
        return NpzModel(tuple((item["weight"], item["bias"]) for item in read), spec)

    def size(self, model: NpzModel) -> ModelSize:
        macs = sum(weight.size for weight, _ in model.layers)
        return ModelSize(macs, macs + sum(bias.size for _, bias in model.layers))

    def open(self, model: NpzModel, share: Share) -> NumpyBackend:
        return NumpyBackend(model)


FORMAT = NpzFormat()


class NumpyBackend:
    """A `contracts.Backend`."""

    name = "numpy"
    device = "cpu"
    self_contained = True
    row_buckets: tuple[int, ...] = ()

    def __init__(self, model: NpzModel) -> None:
        self._model = model

    def run(self, batch: Arrays) -> Result:
        """Tells how many multiply-accumulates it took, as a fact."""
        (values,) = batch
        for index, (weight, bias) in enumerate(self._model.layers):
            values = np.maximum(values, 0) if index and self._model.bends else values
            values = values @ weight.T + bias
        macs = sum(weight.size for weight, _ in self._model.layers)
        return Result((values,), {"macs": macs * len(values)})

    def close(self) -> None:
        """Nothing is held but arrays."""
