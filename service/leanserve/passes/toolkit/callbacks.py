"""Callbacks that any training may want: a moving average of the weights, and an end when nothing gets better."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from leanserve.contracts import BuildContext, Data, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.toolkit.checkpoint import module_state
from leanserve.passes.toolkit.masks import KeepMasks, masks_of
from leanserve.passes.toolkit.training_options import RecoveryOptions, TrainingOptions
from leanserve.passes.toolkit.training_run import TrainingCallback, TrainingRun

if TYPE_CHECKING:
    from leanserve.passes.toolkit.checkpoint import TrainingState

LOSS_ROWS = 32
"""Rows per batch in which the loss on the calibration split is computed."""


class MovingAverage(TrainingCallback):
    """Training ends in an exponential moving average of the weights, buffers included (Polyak and Juditsky 1992).

    The decay grows from 0.1 to the given one, min(decay, (1 + n) / (10 + n)) at step n, so that a short training does
    not end near its start.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._count = 0
        self._average: dict[str, Tensor] = {}

    def begin(self, run: TrainingRun) -> None:
        self._average = _copied(run.module)

    def end_step(self, run: TrainingRun) -> None:
        decay = min(self._decay, (1 + self._count) / (10 + self._count))
        self._count += 1
        for name, now in module_state(run.module).items():
            if now.is_floating_point():
                self._average[name].lerp_(now, 1 - decay)
            else:
                self._average[name].copy_(now)

    def end(self, run: TrainingRun) -> None:
        _load(run.module, self._average)

    def state(self) -> TrainingState:
        return {"count": self._count, **{f"average.{name}": value for name, value in self._average.items()}}

    def restore(self, state: TrainingState) -> None:
        self._count = state["count"]
        for name, average in self._average.items():  # those of `begin`, where the module is
            average.copy_(state[f"average.{name}"])

    @contextmanager
    def in_place(self, module: nn.Module) -> Iterator[None]:
        """While the block runs, the module has the averaged weights."""
        own = _copied(module)
        _load(module, self._average)
        try:
            yield
        finally:
            _load(module, own)


class EarlyStop(TrainingCallback):
    """Stops after `patience` epochs without a lower loss on `data`, which is not trained on; keeps the best epoch.

    With a moving average it is that which is judged and kept.
    """

    def __init__(self, data: Data, patience: int, average: MovingAverage | None = None) -> None:
        self._data = data
        self._patience = patience
        self._average = average
        self._waited = 0
        self._lowest = float("inf")
        self._best: dict[str, Tensor] = {}

    def end_epoch(self, run: TrainingRun) -> None:
        with nullcontext() if self._average is None else self._average.in_place(run.module):
            loss = self._loss(run)
            better = loss < self._lowest
            if better:
                self._lowest, self._best = loss, _copied(run.module)
        self._waited = 0 if better else self._waited + 1
        if self._waited >= self._patience:
            run.stop()

    def end(self, run: TrainingRun) -> None:
        if self._best:
            _load(run.module, self._best)

    def state(self) -> TrainingState:
        best = {f"best.{name}": value for name, value in self._best.items()}
        return {"waited": self._waited, "lowest": self._lowest, **best}

    def restore(self, state: TrainingState) -> None:
        self._waited, self._lowest = state["waited"], state["lowest"]
        self._best = {name.removeprefix("best."): value for name, value in state.items() if name.startswith("best.")}

    @torch.no_grad()
    def _loss(self, run: TrainingRun) -> float:
        """Mean over the rows, as the model will answer: in eval mode."""
        run.module.eval()
        total = 0.0
        for batch in self._data.batches(LOSS_ROWS):
            inputs, labels = run.tensors(batch)
            total += run.objective.loss(inputs, labels).item() * len(inputs[0])
        return total / len(self._data)


class KeepStatistics(TrainingCallback):
    """Batch norms normalise by the mean and variance that they have, in training as in serving; scale and bias are
    trained. A student that is near its teacher stays so: it begins with the statistics of all that the teacher was
    trained on, which the rows at hand know less well."""

    def begin_epoch(self, run: TrainingRun) -> None:
        for child in run.module.modules():
            if isinstance(child, _BatchNorm):
                child.eval()


class LateGradients(TrainingCallback):
    """Steps go by the gradients of so many steps ago, as those of asynchronous processes would that read the weights
    and write their gradients when they get to it (Dean et al., "Large Scale Distributed Deep Networks", 2012). What
    that costs in quality can be seen in one process; what it saves in time cannot."""

    def __init__(self, late: int) -> None:
        self._late = late
        self._waiting: list[list[Tensor]] = []

    def gradients(self, run: TrainingRun, compute: Callable[[], Tensor]) -> Tensor:
        loss = compute()
        trained = [item for group in run.optimiser.param_groups for item in group["params"]]
        self._waiting.append([torch.zeros_like(item) if item.grad is None else item.grad for item in trained])
        due = self._waiting.pop(0) if len(self._waiting) > self._late else None
        for place, item in enumerate(trained):
            item.grad = None if due is None else due[place]
        return loss

    def state(self) -> TrainingState:
        kept = {f"{age}.{place}": grad for age, row in enumerate(self._waiting) for place, grad in enumerate(row)}
        return {"ages": len(self._waiting), **kept}

    def restore(self, state: TrainingState) -> None:
        places = sum(name.startswith("0.") for name in state)
        self._waiting = [[state[f"{age}.{place}"] for place in range(places)] for age in range(state["ages"])]


def recovery_callbacks(
    model: TorchModel, schedule: RecoveryOptions, context: BuildContext
) -> Sequence[TrainingCallback]:
    """As `usual_callbacks`, and what else the schedule asks for.

    Raises:
        PassFailed: as there, or adapters would fill what a mask keeps at zero, or no process holds what a mask is for.
    """
    from leanserve.passes.toolkit.adapters import TrainAdapters

    usual = list(usual_callbacks(model, schedule, context))
    if schedule.lora is not None:
        if masks_of(model):
            raise PassFailed("lora: the model has weights that stay zero, which low-rank changes would fill; drop it")
        usual.insert(0, TrainAdapters(schedule.lora))
    if schedule.splits_weights and masks_of(model):
        raise PassFailed("split: the model has weights that stay zero, by masks of whole weights; drop split: weights")
    if schedule.batch_norm == "stored":
        usual.insert(0, KeepStatistics())
    return [*usual, LateGradients(schedule.late)] if schedule.late else usual


def usual_callbacks(model: TorchModel, schedule: TrainingOptions, context: BuildContext) -> Sequence[TrainingCallback]:
    """What the schedule asks for, and the masks of the model.

    Raises:
        PassFailed: `patience` is set, and the calibration split is empty.
    """
    average = MovingAverage(schedule.ema) if schedule.ema else None
    callbacks: list[TrainingCallback] = [KeepMasks(masks_of(model))]
    if schedule.patience is not None:
        data = context.base.data("calibration", spec=model.spec)
        if not len(data):
            raise PassFailed("patience: the calibration split, whose loss decides, is empty; give it rows or drop it")
        callbacks.append(EarlyStop(data, schedule.patience, average))
    return [*callbacks, average] if average is not None else callbacks


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module_state(module).items()}


@torch.no_grad()
def _load(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, own in module_state(module).items():
        own.copy_(values[name])
