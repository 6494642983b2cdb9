"""Gives the layers of a mixed model back how much they vary, which the mean of different weights loses.

The mean of two networks answers with activations that are too alike; setting each channel's mean and spread to the
average of its parents' makes most of it good (Jordan et al., "REPAIR: REnormalizing Permuted Activations for
Interpolation Repair", 2023). Where batch norm follows, estimating that anew does the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from leanserve.contracts import Data, TorchModel
from leanserve.passes.toolkit.activations import tensors
from leanserve.passes.toolkit.layer_calls import trace_calls

ROWS = 64
FLAT = 1e-6
"""Spread below which a channel is constant and only its mean is set."""
HiddenLayer: TypeAlias = nn.Linear | nn.Conv2d


class Spread(NamedTuple):
    """Mean and standard deviation of every channel of a layer's outputs, [channels]."""

    mean: Tensor
    deviation: Tensor


class _Sums:
    def __init__(self) -> None:
        self.count, self.first, self.second = 0, torch.zeros(()), torch.zeros(())

    def add(self, values: Tensor) -> None:
        self.count += len(values)
        self.first = self.first + values.double().sum(0)
        self.second = self.second + values.double().square().sum(0)

    def spread(self) -> Spread:
        mean = self.first / self.count
        return Spread(mean, (self.second / self.count - mean.square()).clamp_min(0).sqrt())


def spreads(model: TorchModel, data: Data) -> dict[str, Spread]:
    """How the outputs of every hidden layer (linear or convolution, but those that are called last) vary on `data`."""
    layers = _hidden_layers(model)
    sums = {name: _Sums() for name in layers}
    _run(model, layers, data, lambda name, output: sums[name].add(_flat(layers[name], output)))
    return {name: found.spread() for name, found in sums.items() if found.count}


def repair(model: TorchModel, goals: Mapping[str, Spread], data: Data) -> None:
    """Scale and shift the layers of `model`, in place, so that their outputs vary as the goals say.

    A layer sees the repaired outputs of those before it, as it does afterwards.
    """
    layers = {name: layer for name, layer in _hidden_layers(model).items() if name in goals}
    for name, layer in layers.items():
        sums = _Sums()
        _run(model, {name: layer}, data, lambda _, output, sums=sums, layer=layer: sums.add(_flat(layer, output)))
        _set(layer, sums.spread(), goals[name])


def average_spread(parents: Sequence[Mapping[str, Spread]], shares: Sequence[float]) -> dict[str, Spread]:
    """The goals of a mean of these parents."""
    weights = torch.tensor(shares, dtype=torch.float64)[:, None]
    return {
        name: Spread(*((torch.stack(parts) * weights).sum(0) for parts in zip(*(own[name] for own in parents))))  # noqa: B905
        for name in parents[0]
    }


@torch.no_grad()
def _set(layer: HiddenLayer, found: Spread, goal: Spread) -> None:
    scale = torch.where(found.deviation > FLAT, goal.deviation / found.deviation.clamp_min(FLAT), 1.0)
    bias = torch.zeros(len(scale), dtype=torch.float64) if layer.bias is None else layer.bias.double()
    shift = (bias - found.mean) * scale + goal.mean
    layer.weight.mul_(scale.reshape(-1, *([1] * (layer.weight.ndim - 1))).to(layer.weight.dtype))
    if layer.bias is not None:
        layer.bias.copy_(shift)


def _hidden_layers(model: TorchModel) -> dict[str, HiddenLayer]:
    """By name in the order of execution, each once; not the last, whose outputs are answers."""
    found = {name: child for name, child in model.module.named_modules() if isinstance(child, HiddenLayer)}
    order: list[str] = []
    with ExitStack() as stack:
        for name, layer in found.items():
            stack.callback(layer.register_forward_hook(lambda *_, name=name: order.append(name)).remove)
        trace_calls(model, {})
    return {name: found[name] for name in dict.fromkeys(order) if order.count(name) == 1 and name != order[-1]}


def _run(model: TorchModel, layers: Mapping[str, HiddenLayer], data: Data, see: Any) -> None:
    with ExitStack() as stack, torch.no_grad():
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(lambda _, __, output, name=name: see(name, output)).remove)
        for inputs in list(tensors(model, data, ROWS)):
            model.module(*inputs)


def _flat(layer: HiddenLayer, output: Tensor) -> Tensor:
    """[positions, channels]."""
    return (output.movedim(1, -1) if isinstance(layer, nn.Conv2d) else output).reshape(-1, len(layer.weight))
