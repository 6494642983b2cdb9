"""One training on its way: what is lowered, what happens at steps and epochs, and the loop that calls both.

What is special about a way of training is an `Objective` (what is lowered, with parameters of its own: distillation,
features, movement scores) or a `TrainingCallback` (what happens at a step or an epoch: masks, averages, sharpness,
schedules of sparsity, early stopping), never another loop. A `Division` says what of it each of several processes does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Literal

from leanserve.contracts import Batch, BuildContext, Data
from leanserve.errors import PassFailed
from leanserve.passes.toolkit.augmentation import augmented
from leanserve.passes.toolkit.checkpoint import (
    as_part,
    module_state,
    optimiser_state,
    part_of,
    read_training_checkpoint,
    restore_optimiser,
    write_checkpoint,
)
from leanserve.passes.toolkit.training_options import TrainingOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from leanserve.passes.toolkit.checkpoint import TrainingState

CHECKPOINT = "training.safetensors"


class Objective:
    """What training lowers."""

    def loss(self, inputs: tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> torch.Tensor:
        """The scalar loss of a batch: its (augmented) inputs, its labels if there are any. It runs under autocast."""
        raise NotImplementedError

    def extra(self) -> nn.Module | None:
        """Parameters of its own, always the same module: trained and resumed beside the module's, in the optimiser's
        third and fourth group. They are no part of the model and are gone with the objective."""
        return None

    def teachers(self) -> Sequence[nn.Module]:
        """Modules that it asks and does not train."""
        return ()

    def to(self, device: str) -> None:
        """Move what it holds besides the module that is trained, such as a teacher, to where that is trained."""


class TrainingCallback:
    """What happens on the way. Callbacks act in the order in which they are given, at the end in the reverse one."""

    def begin(self, run: TrainingRun) -> None:
        """Before the first step, of a resumed run too; `restore` follows if it is one. The optimiser may be changed."""

    def begin_epoch(self, run: TrainingRun) -> None:
        """Module and extra parameters are in training mode."""

    def gradients(self, run: TrainingRun, compute: Callable[[], torch.Tensor]) -> torch.Tensor:  # noqa: ARG002
        """Leave the gradients of a step in the parameters and return its loss.

        `compute` does it for the weights as they are, from zero, as often as it is called. The learning rate of the
        step stands in the optimiser's groups, and may be changed.
        """
        return compute()

    def end_step(self, run: TrainingRun) -> None:
        """The optimiser has changed the weights; there are no gradients to be followed here."""

    def end_epoch(self, run: TrainingRun) -> None:
        """Before the checkpoint is written; `run.stop()` makes it the last epoch."""

    def end(self, run: TrainingRun) -> None:
        """All epochs are done, in this process or before: leave in the module what training ends in."""

    def state(self) -> TrainingState:
        """What a resumed run needs: tensors and JSON by name."""
        return {}

    def restore(self, state: TrainingState) -> None:
        """Go on from what `state` gave."""


class Division:
    """What this process has of a training that several do together; alone, all of it."""

    def around(self, callbacks: Sequence[TrainingCallback]) -> Sequence[TrainingCallback]:
        """The callbacks, and what the processes have to tell each other before and after them."""
        return callbacks

    def own_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of a batch that this process computes."""
        return tensor

    def whole_state(self, state: TrainingState) -> TrainingState:
        """That of all processes, of this one's."""
        return state

    def own_state(self, state: TrainingState) -> TrainingState:
        """This one's, of that of all processes."""
        return state


@dataclass(frozen=True, slots=True)
class Trained:
    """What happened: mean loss of the first and the last epoch, epochs trained, the epoch from which it was resumed."""

    first_loss: float
    last_loss: float
    epochs: int
    resumed_from: int


class TrainingRun:
    """One training as callbacks see it."""

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        schedule: TrainingOptions,
        callbacks: Sequence[TrainingCallback],
        context: BuildContext,
        division: Division,
    ) -> None:
        self.module = module
        self.objective = objective
        self.schedule = schedule
        self.context = context
        self.optimiser = _optimiser(module, objective.extra(), schedule)
        self.step = 0
        """Steps that are done."""
        self.rows = self.all_rows = 0
        """Of the batch: those that this process computes, and all."""
        self.steps = 0
        """Steps of all epochs."""
        self._division = division
        self._callbacks = division.around(callbacks)
        self._losses: list[float] = []
        self._stopped = False
        self._checkpoint = context.scratch / CHECKPOINT

    @property
    def epochs_done(self) -> int:
        """Epochs that are done."""
        return len(self._losses)

    def stop(self) -> None:
        """Make this epoch the last one."""
        self._stopped = True

    def train_only(self, parameters: Sequence[nn.Parameter]) -> None:
        """Change these of the module's parameters and no others; for `TrainingCallback.begin`."""
        self.optimiser = _optimiser(self.module, self.objective.extra(), self.schedule)
        chosen = {id(parameter) for parameter in parameters}
        for group, _ in zip(self.optimiser.param_groups, range(2), strict=False):  # the others are the objective's
            for parameter in group["params"]:
                parameter.requires_grad_(id(parameter) in chosen)
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in chosen]

    def to_the_end(self, data: Data) -> Trained:
        """Train what is left to train on `data`."""
        per_epoch = max(1, len(data) // self.schedule.batch)
        self.steps = per_epoch * self.schedule.epochs
        self._each("begin")
        self._resume()
        start = self.epochs_done
        self.step = start * per_epoch
        while self.epochs_done < self.schedule.epochs and not self._stopped:
            self._losses.append(self._epoch(data))
            self._each("end_epoch")
            write_checkpoint(self._checkpoint, self._division.whole_state(self._state()))
        for callback in reversed(self._callbacks):
            callback.end(self)
        return Trained(self._losses[0], self._losses[-1], self.epochs_done, start)

    def _epoch(self, data: Data) -> float:
        """One pass over the data. Its randomness depends on seed and epoch only, which is what makes resuming exact."""
        import torch

        seed = self.context.seed * 100_003 + self.epochs_done
        torch.manual_seed(seed)
        self._to_training_mode()
        self._each("begin_epoch")
        total, count = 0.0, 0
        for count, (inputs, labels) in enumerate(self._batches(data, seed), start=1):
            value = self._step(inputs, labels)
            if not math.isfinite(value):
                epoch = self.epochs_done + 1
                raise PassFailed(f"training diverged in epoch {epoch} (loss {value}); lower learning_rate")
            total += value
            note = f"epoch {self.epochs_done + 1}/{self.schedule.epochs}, loss {total / count:.4f}"
            self.context.progress(self.step, self.steps, note)
        return total / count

    def _to_training_mode(self) -> None:
        self.module.train()
        if (extra := self.objective.extra()) is not None:
            extra.train()

    def _batches(self, data: Data, seed: int) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor | None]]:
        # The ragged last batch is left out (another one every epoch): batch norm cannot train on a single row.
        batches = islice(data.batches(self.schedule.batch, shuffle_seed=seed), max(1, len(data) // self.schedule.batch))
        for batch in batches:
            inputs, labels = self.tensors(batch)
            yield self._own(augmented(self.schedule.augment, inputs), labels)

    def _own(
        self, inputs: tuple[torch.Tensor, ...], labels: torch.Tensor | None
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """The rows of a batch that this process computes."""
        self.all_rows = len(inputs[0])
        own = tuple(self._division.own_rows(item) for item in inputs)
        self.rows = len(own[0])
        return own, None if labels is None else self._division.own_rows(labels)

    def tensors(self, batch: Batch) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
        """Inputs and labels of a batch, where the module is."""
        import torch

        device = self.context.device
        inputs = tuple(torch.from_numpy(array).to(device) for array in batch.inputs)
        return inputs, None if batch.labels is None else torch.from_numpy(batch.labels).to(device)

    def _step(self, inputs: tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> float:
        import torch

        rate = self.schedule.rate(self.step, self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        compute = partial(self._gradients, inputs, labels)
        for callback in reversed(self._callbacks):
            compute = partial(callback.gradients, self, compute)
        loss = compute()
        self.optimiser.step()
        self.step += 1
        with torch.no_grad():
            self._each("end_step")
        return loss.item()

    def _gradients(self, inputs: tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> torch.Tensor:
        import torch

        device = torch.device(self.context.device).type
        bf16 = self.schedule.resolved_precision(self.context) == "bf16"
        self.optimiser.zero_grad()
        total = torch.zeros((), device=self.context.device)
        for rows in torch.arange(self.rows).tensor_split(min(self.schedule.parts, self.rows)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                loss = self.objective.loss(
                    tuple(item[part] for item in inputs), None if labels is None else labels[part]
                )
            loss = loss * (len(rows) / self.rows)
            torch.autograd.backward(loss)
            total += loss.detach()
        return total

    def _each(self, hook: Literal["begin", "begin_epoch", "end_step", "end_epoch"]) -> None:
        for callback in self._callbacks:
            getattr(callback, hook)(self)

    def _identity(self) -> list[str]:
        """A checkpoint of another schedule, or with other callbacks, is not gone on with."""
        return [self.schedule.model_dump_json(), *(type(callback).__name__ for callback in self._callbacks)]

    def _state(self) -> TrainingState:
        extra = self.objective.extra()
        state = {"identity": self._identity(), "losses": self._losses, "stopped": self._stopped}
        state |= as_part(module_state(self.module), "module")
        state |= as_part({} if extra is None else module_state(extra), "extra")
        state |= as_part(optimiser_state(self.optimiser), "optimiser")
        for index, callback in enumerate(self._callbacks):
            state |= as_part(callback.state(), f"callback.{index}")
        return state

    def _resume(self) -> None:
        from leanserve.runtime.formats.tied_tensors import load_tensors

        found = read_training_checkpoint(self._checkpoint)
        if found is None or found["identity"] != self._identity():
            return
        found = self._division.own_state(found)
        load_tensors(self.module, part_of(found, "module"))
        if (extra := self.objective.extra()) is not None:
            load_tensors(extra, part_of(found, "extra"))
        restore_optimiser(self.optimiser, part_of(found, "optimiser"))
        for index, callback in enumerate(self._callbacks):
            callback.restore(part_of(found, f"callback.{index}"))
        self._losses, self._stopped = found["losses"], found["stopped"]


def _optimiser(module: nn.Module, extra: nn.Module | None, schedule: TrainingOptions) -> torch.optim.Optimizer:
    """Weight decay only on matrices and kernels: on biases and normalisation it pulls towards a worse function."""
    import torch

    groups = []
    for part in (module, extra) if extra is not None else (module,):
        weights = [parameter.requires_grad_() for parameter in part.parameters() if parameter.is_floating_point()]
        matrices = [weight for weight in weights if weight.ndim > 1]
        groups.append({"params": matrices, "weight_decay": schedule.weight_decay})
        groups.append({"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0})
    if schedule.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=schedule.learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=schedule.learning_rate)
