"""Training that ends where the loss is flat, and how flat it is there.

A minimum that is flat loses little when its weights are moved a little, by rounding for example. `Sharpness` goes down
where the worst neighbour goes down (Foret et al., "Sharpness-Aware Minimization", 2021), `WeightAverage` ends in the
mean of many places of one valley (Izmailov et al., "Averaging Weights Leads to Wider Optima", 2018).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from leanserve.contracts import Base, Data, TorchModel
from leanserve.passes.toolkit.barrier import answer_loss
from leanserve.passes.toolkit.checkpoint import TrainingState, module_state
from leanserve.passes.toolkit.training_run import TrainingCallback, TrainingRun

NOISE = 0.1
"""Of a weight tensor's own spread: how far weights are moved to see how flat it is around them."""
DRAWS = 4


class Sharpness(TrainingCallback):
    """Takes the gradients at the point within `rho` of the weights where the loss is largest, to first order.

    Batch norms see the batch once: the second look must not count in their statistics.
    """

    def __init__(self, rho: float) -> None:
        self._rho = rho

    def gradients(self, run: TrainingRun, compute: Callable[[], Tensor]) -> Tensor:
        loss = compute()
        weights = [weight for group in run.optimiser.param_groups for weight in group["params"]]
        weights = [weight for weight in weights if weight.grad is not None]
        before = [weight.detach().clone() for weight in weights]
        norm = torch.stack([weight.grad.norm() for weight in weights]).norm() + 1e-12
        with torch.no_grad():
            for weight in weights:
                weight.add_(weight.grad, alpha=self._rho / norm.item())
        statistics = _statistics(run.module)
        compute()
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
            for buffer, value in statistics:
                buffer.copy_(value)
        return loss


class WeightAverage(TrainingCallback):
    """Training ends in the mean of the weights after each epoch from the share `start` on; the learning rate stays as
    it is there, so that the epochs differ. Batch norm must be estimated anew afterwards."""

    def __init__(self, start: float) -> None:
        self._start = start
        self._count = 0
        self._sums: dict[str, Tensor] = {}

    def gradients(self, run: TrainingRun, compute: Callable[[], Tensor]) -> Tensor:
        first = round(self._start * run.steps)
        if run.step >= first:
            for group in run.optimiser.param_groups:
                group["lr"] = run.schedule.rate(first, run.steps)
        return compute()

    def end_epoch(self, run: TrainingRun) -> None:
        if run.step <= round(self._start * run.steps):
            return
        floats = {name: item for name, item in module_state(run.module).items() if item.is_floating_point()}
        self._sums = {name: item.double() + self._sums.get(name, 0) for name, item in floats.items()}
        self._count += 1

    @torch.no_grad()
    def end(self, run: TrainingRun) -> None:
        own = module_state(run.module)
        for name, total in self._sums.items():
            own[name].copy_(total / self._count)

    def state(self) -> TrainingState:
        return {"count": self._count, **{f"sum.{name}": item for name, item in self._sums.items()}}

    def restore(self, state: TrainingState) -> None:
        self._count = state["count"]
        self._sums = {name.removeprefix("sum."): item for name, item in state.items() if name.startswith("sum.")}


@torch.no_grad()
def rise_under_noise(model: TorchModel, base: Base, data: Data, seed: int) -> float:
    """How much the distance from the base's answers grows when every matrix and kernel is moved by a tenth of its own
    spread, at random: the mean of four draws. The smaller, the flatter."""
    still = answer_loss(model, base, data)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(DRAWS):
        moved = dataclasses.replace(model, module=copy.deepcopy(model.module))
        for weight in moved.module.parameters():
            if weight.ndim > 1:
                noise = torch.randn(weight.shape, generator=generator) * (weight != 0)
                weight.add_(noise, alpha=NOISE * weight.std().item())
        losses.append(answer_loss(moved, base, data))
    return sum(losses) / len(losses) - still


def _statistics(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm)]
    return [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
