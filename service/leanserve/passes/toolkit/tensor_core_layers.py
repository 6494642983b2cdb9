"""Linear layers for products that only the tensor cores of recent NVIDIA GPUs have; a CPU computes them slowly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanserve.passes.toolkit.float_modes import bridge
from leanserve.runtime.formats.torch_storage import LARGEST_FP8

MULTIPLE: Final = 16
"""Of which tensor cores want both sides of a matrix of 8 bits."""
SPARSE_MULTIPLES: Final = (32, 64)
"""Of which they want outputs and inputs of a 2:4 sparse matrix in 16 bits."""

ScaledBy = Literal["row", "tensor"]


class Fp8Linear(nn.Module):
    """A linear layer whose weights are 8-bit floats, and whose inputs become so in every batch.

    A scale per row (per token) and per output, or one for a whole tensor: then rows share the scale of their batch.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear, scale: ScaledBy) -> None:
        super().__init__()
        self.by_row = scale == "row"
        codes, scales = self._coded(layer.weight.detach().float())
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scales)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        codes, scales = self._coded(x.reshape(-1, x.shape[-1]).float())
        # A private name of torch, which torchao multiplies by, too; the product is added up in float32.
        y = torch._scaled_mm(codes, self.weight.t(), scales, self.scale.t(), out_dtype=torch.bfloat16)
        y = y.reshape(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def _coded(self, values: Tensor) -> tuple[Tensor, Tensor]:
        largest = values.abs().amax(1, keepdim=True) if self.by_row else values.abs().amax()
        scales = (largest / LARGEST_FP8).clamp_min(torch.finfo(torch.float32).tiny)
        return (values / scales).to(torch.float8_e4m3fn), scales


class HalfSparseLinear(nn.Module):
    """A linear layer of which two of four neighbouring weights are zero, compressed once it is on a GPU."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self._compressed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self._on_gpu() if self.weight.is_cuda else self.weight
        y = F.linear(x.reshape(-1, x.shape[-1]), weight, self.bias)
        return y.reshape(*x.shape[:-1], -1)

    def _on_gpu(self) -> Tensor:
        if self._compressed is None:
            from torch.sparse import to_sparse_semi_structured

            self._compressed = to_sparse_semi_structured(self.weight.detach())
        return self._compressed


def fits_fp8(layer: nn.Linear) -> bool:
    """Whether tensor cores multiply by such a weight in 8 bits."""
    return all(size % MULTIPLE == 0 for size in layer.weight.shape)


def is_half_sparse(layer: nn.Linear) -> bool:
    """Whether of every four neighbouring weights of an output two are zero, and tensor cores take the shape."""
    if any(size % multiple for size, multiple in zip(layer.weight.shape, SPARSE_MULTIPLES, strict=True)):
        return False
    return bool(((layer.weight.reshape(-1, 4) != 0).sum(1) <= 2).all())


def put_on_tensor_cores(
    module: nn.Module, names: Iterable[str], made_of: Callable[[nn.Linear], nn.Module]
) -> nn.Module:
    """Compute a module of float32 in bfloat16, and the linear layers of these names by what is made of them."""
    module.to(torch.bfloat16)
    bridge(module, inside=torch.bfloat16, outside=torch.float32)
    for name in names:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        module.set_submodule(name, made_of(layer))
    return module
