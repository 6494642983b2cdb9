"""Counts what a torch model costs before it is timed: multiply-accumulates per row, and parameters.

MACs do not depend on the machine, so passes use them as targets and the report can compare what was removed with what
was gained. They are counted where tensors are really multiplied (convolutions, linear layers, attention, recurrent
layers), not by module type, so that hand-written forward code counts too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from leanserve.contracts import ModelSpec, TorchModel


def count_macs(model: TorchModel, length: int = 16) -> int:
    """Multiply-accumulates per row; dynamic axes (tokens) are taken as `length`."""
    return sum(_macs_by_operator(model, length).values())


def convolution_share(model: TorchModel) -> float | None:
    """Share (0..1) of the multiply-accumulates that convolutions make; `None` without any."""
    macs = _macs_by_operator(model)
    convolved = sum(count for operator, count in macs.items() if "convolution" in operator)
    return convolved / sum(macs.values()) if macs else None


def _macs_by_operator(model: TorchModel, length: int = 16) -> dict[str, int]:
    counter = FlopCounterMode(display=False)
    with _plain_kernels(model.module), torch.no_grad(), counter:
        model.module(*example(model.spec, length))
    counted = counter.get_flop_counts().get("Global", {})
    return {str(operator): int(flops) // 2 for operator, flops in counted.items()}


def count_parameters(model: TorchModel) -> int:
    """Trained numbers in the model; a tensor that is shared counts once, buffers do not count."""
    return sum(parameter.numel() for parameter in model.module.parameters())


def example(spec: ModelSpec, length: int = 16, rows: int = 1) -> tuple[torch.Tensor, ...]:
    """A batch of random rows as tensors."""
    return tuple(torch.from_numpy(array) for array in spec.example(rows, length))


@contextmanager
def _plain_kernels(module: nn.Module) -> Iterator[None]:
    """Fused kernels (attention, encoder layers, recurrent layers) hide their products from the counter: go without."""
    recurrent = any(isinstance(child, nn.RNNBase) for child in module.modules())
    onednn = torch.backends.mkldnn.enabled and not recurrent
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            # Setting oneDNN's flags re-applies its TF32 flag, which builds without Intel GPUs answer with a warning.
            warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
            with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=onednn):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
