"""How often, and on what shapes, the layers of a model are called: what a layer costs follows from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from leanserve.contracts import TorchModel
from leanserve.runtime.formats.torch_size import example


class Call(NamedTuple):
    """Shapes of one call of a layer for a single row, the batch axis included (it is 1)."""

    input: tuple[int, ...]
    output: tuple[int, ...]


def trace_calls(model: TorchModel, layers: Mapping[str, nn.Module], length: int = 16) -> dict[str, list[Call]]:
    """The input and output shapes of every call of the named layers during one forward pass of one row."""
    calls: dict[str, list[Call]] = {name: [] for name in layers}
    with ExitStack() as stack, torch.no_grad():
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(_recorder(calls[name])).remove)
        model.module(*example(model.spec, length))
    return calls


def execution_order(model: TorchModel, layers: Mapping[str, nn.Module]) -> list[str]:
    """The names of these layers in the order of their first calls."""
    order: dict[str, None] = {}
    with ExitStack() as stack, torch.no_grad():
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(_note, order, name)).remove)
        model.module(*example(model.spec))
    return list(order)


def _note(order: dict[str, None], name: str, *_: Any) -> None:
    order.setdefault(name)


def positions(calls: Sequence[Call], channel_axis: int) -> int:
    """Places per row where a layer's weights are used: pixels of a convolution's output, tokens of a linear layer."""
    return sum(math.prod(call.output) // call.output[channel_axis] for call in calls)


def _recorder(calls: list[Call]) -> Any:
    def record(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        calls.append(Call(tuple(inputs[0].shape), tuple(output.shape)))

    return record
