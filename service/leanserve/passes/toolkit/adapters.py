"""Training low-rank changes of the weights alone (Hu et al., "LoRA", 2022), folded into them in the end.

The optimiser then keeps two numbers for each of the few that are trained, not for every weight, which is what a large
model has no memory for; and few rows cannot pull the model far from where it was. The model that comes out has the
structure of the one that went in, and costs what it did. See `merge_lora` for adapters that were trained elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from leanserve.errors import PassFailed
from leanserve.passes.toolkit.training_run import TrainingCallback, TrainingRun


class LowRankChange(nn.Module):
    """A weight [outputs, ...] and a change of it of a low rank, which is nothing at first."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        inputs = weight[0].numel()
        self.up = nn.Parameter(weight.new_zeros(len(weight), rank))
        self.down = nn.Parameter(torch.randn(rank, inputs).to(weight) / inputs**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view(weight.shape)


class TrainAdapters(TrainingCallback):
    """Of the module only low-rank changes of its linear layers and convolutions are trained. The first callback, so
    that the others see the same parameters from beginning to end."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._adapted: list[nn.Module] = []

    def begin(self, run: TrainingRun) -> None:
        self._adapted = list(_layers(run.module, self._rank))
        if not self._adapted:
            raise PassFailed(f"lora: no linear layer or convolution has a rank above {self._rank}; lower it")
        with torch.random.fork_rng([]):
            torch.manual_seed(run.context.seed)
            changes = [LowRankChange(layer.get_parameter("weight").detach(), self._rank) for layer in self._adapted]
        for layer, change in zip(self._adapted, changes, strict=True):
            # mypy knows neither of both functions as typed
            parametrize.register_parametrization(layer, "weight", change)  # type: ignore[no-untyped-call, unused-ignore]
        run.train_only([parameter for change in changes for parameter in change.parameters()])

    def end(self, run: TrainingRun) -> None:  # noqa: ARG002 - it knows its layers
        for layer in self._adapted:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def _layers(module: nn.Module, rank: int) -> Iterator[nn.Module]:
    """Those whose weight has more than this rank; one that shares its weight with another layer is left alone."""
    layers = [child for child in module.modules() if isinstance(child, nn.Linear | nn.Conv2d)]
    users: dict[int, int] = {}
    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    for layer in layers:
        sizes = (len(layer.weight), layer.weight[0].numel())
        if users[id(layer.weight)] == 1 and min(sizes) > rank:
            yield layer
