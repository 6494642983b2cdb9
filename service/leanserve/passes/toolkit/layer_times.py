"""What layers cost on this machine at a given width: measured once each, into a table.

Multiply-accumulates mislead: a convolution of 24 channels may take as long as one of 32, and an early layer with large
images longer than a late one of as many operations. A layer is timed alone, in torch, on one row as the model gives it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from leanserve.contracts import TorchModel
from leanserve.passes.toolkit.layer_calls import Call, trace_calls
from leanserve.passes.toolkit.timing import least_seconds
from leanserve.runtime.formats.torch_size import example

MEASURED_S = 0.02
"""How long a layer is timed at one width."""
WHOLE_S = 1.0
"""How long two models are timed beside each other."""

_Layer = nn.Conv2d | nn.Linear


class LayerTimes:
    """Seconds per row of the convolutions and linear layers of a model, by their inputs and outputs."""

    def __init__(self, model: TorchModel) -> None:
        self._layers = {name: child for name, child in model.module.named_modules() if isinstance(child, _Layer)}
        self._calls = trace_calls(model, self._layers)
        self._known: dict[tuple[str, int, int], float] = {}

    def seconds(self, name: str, inputs: int, outputs: int) -> float:
        """Of a layer with so many channels in and out, for all its calls of one row."""
        key = (name, inputs, outputs)
        if key not in self._known:
            made = _of_width(self._layers[name], inputs, outputs)
            self._known[key] = seconds_of(made, self._calls[name], inputs)
        return self._known[key]

    def widths(self, name: str) -> tuple[int, int]:
        """Channels in and out of a layer as it was."""
        return channels_of(self._layers[name])


def channels_of(layer: Any) -> tuple[int, int]:
    """Channels in and out of a convolution or linear layer."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features


def seconds_of(module: nn.Module, calls: Sequence[Call], channels: int) -> float:
    """Of a module that takes so many channels, for one row's calls of these shapes."""
    axis = 1 if any(isinstance(child, nn.Conv2d) for child in module.modules()) else -1
    rows = [torch.randn(_with_channels(call.input, axis, channels)) for call in calls]
    if not rows:
        return 0.0
    with torch.inference_mode():
        runs = {str(place): partial(module, row) for place, row in enumerate(rows)}
        return sum(least_seconds(runs, MEASURED_S * len(rows)).values())


def seconds_of_row(model: TorchModel) -> float:
    """Of a whole model."""
    with torch.inference_mode():
        return least_seconds({"": partial(model.module, *example(model.spec))}, WHOLE_S / 2)[""]


def ratio_of(made: TorchModel, base: TorchModel) -> float:
    """The time of a row in one model as a share of that in another, in turns."""
    inputs = example(base.spec)
    with torch.inference_mode():
        ways = {"made": partial(made.module, *inputs), "base": partial(base.module, *inputs)}
        taken = least_seconds(ways, WHOLE_S)
    return taken["made"] / taken["base"]


def _of_width(layer: nn.Module, inputs: int, outputs: int) -> nn.Module:
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Linear(inputs, outputs, bias=bias).eval()
    assert isinstance(layer, nn.Conv2d)
    if (inputs, outputs) == channels_of(layer):
        return copy.deepcopy(layer)
    groups = layer.groups if layer.groups < layer.in_channels else inputs  # depthwise stays so
    if inputs % groups or outputs % groups:
        groups = 1
    shape: Mapping[str, Any] = {"stride": layer.stride, "dilation": layer.dilation, "padding": layer.padding}
    kernel: Any = layer.kernel_size
    return nn.Conv2d(inputs, outputs, kernel, groups=groups, bias=bias, **shape).eval()


def _with_channels(shape: Sequence[int], axis: int, channels: int) -> list[int]:
    sizes = list(shape)
    sizes[axis] = channels
    return sizes
