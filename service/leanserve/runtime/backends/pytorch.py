"""Runs torch modules on the CPU, eager or compiled.

numpy arrays and torch tensors share their memory in both directions; what the thread needs (its share of the cores,
denormals flushed, since a few of them slow a layer down many times) is set when the backend is created on it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from leanserve.contracts import Array, Arrays, Result, TorchModel
from leanserve.errors import BadInput


class TorchBackend:
    """A `contracts.Backend`. Run it on threads on which one was created: that sets their threads and denormals.

    A module with an attribute `row_buckets` is compiled: it is fed as it was compiled, and the attribute says for which
    numbers of rows (empty: any). How many graphs it compiles in a batch, as its `compilations` counts them, is told
    with the batch. Any other module is fed channels-last images if its weights are channels-last.
    """

    def __init__(self, model: TorchModel, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)  # before the first parallel region: its worker threads inherit the setting
        self._module = model.module.eval()
        self._dtypes = [torch_dtype(item.dtype) for item in model.spec.outputs]
        compiled: tuple[int, ...] | None = getattr(model.module, "row_buckets", None)
        self._row_buckets = compiled or ()
        self._compiles = compiled is not None
        self._channels_last = compiled is None and has_channels_last_weights(model.module)

    @property
    def name(self) -> str:
        return "pytorch"

    @property
    def device(self) -> str:
        return "cpu"

    @property
    def self_contained(self) -> bool:
        return False

    @property
    def row_buckets(self) -> tuple[int, ...]:
        return self._row_buckets

    def run(self, batch: Arrays) -> Result:
        """Outputs have the dtypes of the spec, so that bfloat16, which numpy lacks, never leaves."""
        with torch.inference_mode():
            inputs = [torch.from_numpy(writable_view(array)) for array in batch]
            if self._channels_last:
                inputs = [to_channels_last(item) for item in inputs]
            before = self._compilations()
            try:
                outputs = self._module(*inputs)
            except IndexError as error:
                if "index out of range in self" not in str(error):  # as an embedding says it
                    raise
                raise BadInput(f"the model looks up what an input's values point to: {error}") from error
            tensors = outputs if isinstance(outputs, tuple) else (outputs,)
            outputs = (item.to(dtype).numpy() for item, dtype in zip(tensors, self._dtypes, strict=True))
            made = self._compilations() - before
            return Result(tuple(outputs), {"compiled_graphs": made}) if made else Result(tuple(outputs))

    def _compilations(self) -> int:
        return int(getattr(self._module, "compilations", 0)) if self._compiles else 0

    def close(self) -> None:
        """Let go of the weights."""
        self._module = torch.nn.Identity()


class _Shared:
    """Another view of an array's memory, declared writable: torch warns of read-only arrays, and models never write."""

    def __init__(self, array: Array) -> None:
        self.array = array  # keeps the memory alive
        address, _ = array.__array_interface__["data"]
        self.__array_interface__: dict[str, Any] = {**array.__array_interface__, "data": (address, False)}


def writable_view(array: Array) -> Array:
    """The array, contiguous, as torch takes it without a warning; a copy only where its rows are not contiguous."""
    contiguous = np.ascontiguousarray(array)
    return contiguous if contiguous.flags.writeable else np.asarray(_Shared(contiguous))


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that numpy calls so."""
    return torch.from_numpy(np.empty(0, name)).dtype


def has_channels_last_weights(module: torch.nn.Module) -> bool:
    """Whether kernels of convolutions lie channels last, and not both ways at once."""
    kernels = [weight for weight in module.parameters() if weight.ndim == 4]
    return any(
        weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous() for weight in kernels
    )


def to_channels_last(item: torch.Tensor) -> torch.Tensor:
    """Images channels last; anything else as it is."""
    return item.contiguous(memory_format=torch.channels_last) if item.ndim == 4 else item
