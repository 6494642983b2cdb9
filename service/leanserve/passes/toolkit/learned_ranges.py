"""Training with the rounding of 8 bits in the forward pass: at the very points at which the graph is quantized.

Weights are rounded to int8 by scales of the options; each activation that the graph quantizes before a layer is
rounded over a range that is trained with the weights (Esser et al. 2020, "Learned Step Size Quantization"). Rounding
has no gradient: it is passed through, and what is cut off is not (Bengio et al. 2013). Layers that read one tensor
share its range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from leanserve.contracts import Base, TorchModel
from leanserve.passes.toolkit.histograms import Range
from leanserve.passes.toolkit.int8_graph import Weights
from leanserve.passes.toolkit.teacher import MatchTeacher, TeacherTerms
from leanserve.passes.toolkit.training_run import TrainingCallback, TrainingRun

LEVELS = 255


class Point(NamedTuple):
    """A layer of the module that is computed in integers, and the tensor of the graph that it reads."""

    layer: str
    tensor: str


class LearnedRanges(nn.Module):
    """The ranges of tensors, as parameters: the logarithms of how far they reach, below and above zero."""

    def __init__(self, ranges: Mapping[str, Range]) -> None:
        super().__init__()
        self._names = list(ranges)
        ends = torch.tensor([end for low, high in ranges.values() for end in (-low, high)], dtype=torch.float32)
        self.register_buffer("sides", (ends > 0).float())
        self.reach = nn.Parameter(ends.clamp_min(1e-8).log())  # a vector, so that no weight decay pulls at it

    def ends(self, name: str) -> tuple[Tensor, Tensor]:
        """The lower and the upper end of a range."""
        place = 2 * self._names.index(name)
        below, above = (self.reach.exp() * self.get_buffer("sides"))[place : place + 2].unbind()
        return -below, above

    def found(self) -> dict[str, Range]:
        """All ranges as they are now."""
        with torch.no_grad():
            return {name: (float(low), float(high)) for name in self._names for low, high in [self.ends(name)]}


class RoundedLayers:
    """While it is in place, the layers of a module compute with rounded weights and inputs."""

    def __init__(
        self, module: nn.Module, points: Sequence[Point], ranges: LearnedRanges, largest: int, weights: Weights
    ) -> None:
        self._handles: list[Any] = []
        for layer, tensor in points:
            child = module.get_submodule(layer)
            self._handles.append(child.register_forward_pre_hook(_RoundInput(ranges, tensor)))
            parametrize.register_parametrization(child, "weight", RoundedWeight(largest, weights), unsafe=True)
        self._layers = [module.get_submodule(point.layer) for point in points]

    def remove(self) -> None:
        """Leave the trained weights, without rounding."""
        for handle in self._handles:
            handle.remove()
        for child in self._layers:
            parametrize.remove_parametrizations(child, "weight", leave_parametrized=False)


class RoundedWeight(nn.Module):
    """Weights on the grid of int8, with a scale per output or one for all."""

    def __init__(self, largest: int, weights: Weights) -> None:
        super().__init__()
        self._largest, self._weights = largest, weights

    def forward(self, weight: Tensor) -> Tensor:
        """The weight [outputs, ...] as the kernel will see it."""
        rest = tuple(range(1 if self._weights == "per_channel" else 0, weight.ndim))
        scales = weight.detach().abs().amax(rest, keepdim=True).clamp_min(1e-12) / self._largest
        return weight + ((weight / scales).round() * scales - weight).detach()


def rounded(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Values on the grid of 8 bits over a range; both ends have gradients."""
    step = (high - low) / LEVELS
    zero = (-low / step).detach().round()
    codes = values / step + zero
    codes = codes + (codes.round() - codes).detach()
    return (codes.clamp(0, LEVELS) - zero) * step


class _RoundInput:
    def __init__(self, ranges: LearnedRanges, tensor: str) -> None:
        self._ranges, self._tensor = ranges, tensor

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        low, high = self._ranges.ends(self._tensor)
        return (rounded(inputs[0].float(), low, high).to(inputs[0].dtype), *inputs[1:])


class MatchRounded(MatchTeacher):
    """Answering like the base, with ranges that are trained beside the student."""

    def __init__(self, student: TorchModel, base: Base, terms: TeacherTerms, ranges: LearnedRanges) -> None:
        super().__init__(student, base, terms)
        self._ranges = ranges

    def extra(self) -> nn.Module:
        return self._ranges


class FreezeRanges(TrainingCallback):
    """From a share of the steps on the ranges stay as they are, and the weights settle in them."""

    def __init__(self, ranges: LearnedRanges, share: float) -> None:
        self._ranges, self._share = ranges, share

    def gradients(self, run: TrainingRun, compute: Any) -> Tensor:
        loss: Tensor = compute()
        if run.step + 1 > self._share * run.steps:
            self._ranges.reach.grad = None
        return loss
