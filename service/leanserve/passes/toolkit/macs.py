"""Counts what a model costs before it is timed: multiply-accumulates per row, and parameters.

MACs do not depend on the machine, so passes use them as targets and the report can compare what was removed with what
was gained. They are counted where tensors are really multiplied (convolutions, linear layers, attention, recurrent
layers), not by module type, so that hand-written forward code counts too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from leanserve.contracts import ModelSpec, TorchModel


class Call(NamedTuple):
    """Shapes of one call of a layer for a single row, the batch axis included (it is 1)."""

    input: tuple[int, ...]
    output: tuple[int, ...]


def count_macs(model: TorchModel, length: int = 16) -> int:
    """Multiply-accumulates per row; dynamic axes (tokens) are taken as `length`."""
    counter = FlopCounterMode(display=False)
    with _plain_kernels(model.module), torch.no_grad(), counter:
        model.module(*example(model.spec, length))
    return int(counter.get_total_flops()) // 2


def count_parameters(model: TorchModel) -> int:
    """Trained numbers in the model; a tensor that is shared counts once, buffers do not count."""
    return sum(parameter.numel() for parameter in model.module.parameters())


def trace_calls(model: TorchModel, layers: Mapping[str, nn.Module], length: int = 16) -> dict[str, list[Call]]:
    """The input and output shapes of every call of the named layers during one forward pass of one row."""
    calls: dict[str, list[Call]] = {name: [] for name in layers}
    with ExitStack() as stack, torch.no_grad():
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(_recorder(calls[name])).remove)
        model.module(*example(model.spec, length))
    return calls


def positions(calls: Sequence[Call], channel_axis: int) -> int:
    """Places per row where a layer's weights are used: pixels of a convolution's output, tokens of a linear layer."""
    return sum(math.prod(call.output) // call.output[channel_axis] for call in calls)


def example(spec: ModelSpec, length: int = 16, rows: int = 1) -> tuple[torch.Tensor, ...]:
    """A batch of random rows as tensors."""
    return tuple(torch.from_numpy(array) for array in spec.example(rows, length))


def _recorder(calls: list[Call]) -> Any:
    def record(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        calls.append(Call(tuple(inputs[0].shape), tuple(output.shape)))

    return record


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
