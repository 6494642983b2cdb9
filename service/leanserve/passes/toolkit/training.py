"""The one training loop: everything that trains calls `train`, with what it lowers and with what happens on the way.

It exists once so that what is easy to get wrong is right once: a run that was interrupted goes on from its last epoch
and ends in the same weights as an undisturbed one, bfloat16 is used only where the CPU has instructions for it, and
whoever waits sees how far it is. What is special about a way of training is an `Objective` (what is lowered, with
parameters of its own: distillation, features, movement scores) or a `TrainingCallback` (what happens at a step or an
epoch: masks, averages, sharpness, schedules of sparsity, early stopping), never another loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from leanserve.contracts import Batch, BuildContext, Data, ModelSpec
from leanserve.errors import PassFailed
from leanserve.memory import is_out_of_memory
from leanserve.passes.base import Need
from leanserve.passes.toolkit.augmentation import Augments, augmented, require_augmentable
from leanserve.passes.toolkit.checkpoint import (
    as_part,
    module_state,
    optimiser_state,
    part_of,
    read_training_checkpoint,
    restore_optimiser,
    write_checkpoint,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from leanserve.passes.toolkit.checkpoint import TrainingState

FAST_BF16 = frozenset({"avx512_bf16", "amx_bf16"})
"""Instruction sets that train faster in bfloat16; ARM's `bf16` is left out because nobody has measured it here."""

CHECKPOINT = "training.safetensors"


class TrainingOptions(BaseModel):
    """The schedule, and options of every pass that trains: inherited, so that they mean the same everywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: PositiveInt = 10
    batch: PositiveInt = 32
    optimiser: Literal["adamw", "sgd"] = "adamw"
    """`sgd` has Nesterov momentum of 0.9."""
    learning_rate: PositiveFloat = 2e-3
    """The peak: reached by a linear warm-up, left along a cosine that ends at zero."""
    weight_decay: float = Field(default=1e-4, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of all steps in which the learning rate grows."""
    augment: Augments = ()
    """Random changes of the rows, fresh in every epoch: a name or a list of them, in their order."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """`auto` computes in bfloat16 where the CPU has instructions for it; weights are float32 in any case."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay per step of a moving average of the weights, in which training ends instead of the last ones; 0: none."""
    patience: PositiveInt | None = None
    """Stop after so many epochs without a lower loss on the calibration split, and keep the best epoch's weights."""
    parts: PositiveInt = 1
    """Each batch goes through the model in so many parts, whose gradients add up: less memory, the same step."""
    processes: PositiveInt = 1
    """Each computes its share of every batch, on its share of the threads."""

    @property
    def training_needs(self) -> frozenset[Need]:
        """What a pass needs to train by these options."""
        judged: frozenset[Need] = frozenset({"calibration"}) if self.patience is not None else frozenset()
        return judged | {"train", "batches"}

    @property
    def processes_needed(self) -> int:
        """How many processes run a pass with these options."""
        return self.processes

    @property
    def splits_weights(self) -> bool:
        """Whether each process holds a share of the weights, and sees whole batches."""
        return False

    def resolved_precision(self, context: BuildContext) -> Literal["float32", "bf16"]:
        """What `auto` means where this context trains."""
        if self.precision == "auto":
            fast = context.device != "cpu" or FAST_BF16.intersection(context.hardware.isa)
            return "bf16" if fast else "float32"
        return self.precision

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step, from 0, of so many."""
        rising = self.warmup * steps
        if step < rising:
            return self.learning_rate * (step + 1) / (rising + 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


class LabelledTrainingOptions(TrainingOptions):
    """Of passes that train on a teacher's answers, and on labels beside them where `alpha` says so."""

    alpha: float = Field(default=0.0, ge=0, le=1)
    """Weight of the hard-label cross-entropy beside the teacher's 1 - alpha; above 0 it needs labels."""

    @model_validator(mode="after")
    def _mixtures_have_no_label(self) -> Self:
        if self.alpha and (mixed := {"mixup", "tokens"}.intersection(self.augment)):
            raise ValueError(
                f"augment: {', '.join(sorted(mixed))} leaves rows without a label of their own; drop alpha"
            )
        return self

    @property
    def needs(self) -> frozenset[Need]:
        labels: frozenset[Need] = frozenset({"labels"}) if self.alpha else frozenset()
        return self.training_needs | labels

    def require_classes(self, spec: ModelSpec, kind: str) -> None:
        """Raise `PassFailed` if a pass of this kind is to learn labels, and the model has no classes."""
        if self.alpha and not spec.labels:
            raise PassFailed(f"{kind}.alpha is {self.alpha}, but the base has no classes; set it to 0")


class RecoveryOptions(LabelledTrainingOptions):
    """Of passes that train a given model on, and change nothing else of it."""

    lora: PositiveInt | None = None
    """Only changes of the weights of this rank are trained, and folded into them in the end."""
    pseudo_labels: float | None = Field(default=None, gt=0, le=1)
    """Rows without labels get the teacher's answer as their label where its probability is at least this."""
    late: int = Field(default=0, ge=0)
    """Every gradient is used so many steps late: a simulation of as many asynchronous processes."""
    batch_norm: Literal["batch", "stored"] = "batch"
    """By which mean and variance batch norms normalise while they train: those of the batch, which move the stored ones
    along, or the stored ones, which then stay as they are."""
    split: Literal["rows", "weights"] = "rows"
    """What several processes share: the rows of a batch, or the weights, if the model is larger than one may hold."""

    @model_validator(mode="after")
    def _pseudo_labels_weigh(self) -> Self:
        if self.pseudo_labels is not None and not self.alpha:
            raise ValueError("pseudo_labels are labels, whose weight is alpha: set that above 0, or drop them")
        return self

    @model_validator(mode="after")
    def _weights_are_split_between_processes(self) -> Self:
        if self.split == "weights" and self.processes == 1:
            raise ValueError("split: weights is between processes; set processes above 1, or drop it")
        if self.split == "weights" and self.lora is not None:
            raise ValueError("lora trains changes of whole weights, and split: weights leaves none whole; drop one")
        return self

    @property
    def splits_weights(self) -> bool:
        return self.split == "weights"

    @property
    def needs(self) -> frozenset[Need]:
        return self.training_needs if self.pseudo_labels is not None else super().needs


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


@dataclass(frozen=True, slots=True)
class Trained:
    """What happened: mean loss of the first and the last epoch, epochs trained, the epoch from which it was resumed."""

    first_loss: float
    last_loss: float
    epochs: int
    resumed_from: int


def train(
    module: nn.Module,
    objective: Objective,
    data: Data,
    schedule: TrainingOptions,
    callbacks: Sequence[TrainingCallback],
    context: BuildContext,
) -> Trained:
    """Train `module` in place on `data` (usually the base's train split) and leave it in eval mode.

    After an interruption the same call with the same `context.scratch` goes on behind the last finished epoch and gives
    the same weights as an undisturbed run.

    Raises:
        PassFailed: there are no rows, the augmentation does not fit the inputs, the loss is not finite, or there is no
            memory for the batches; or the base says that rows share no batch, where a step needs many.
    """
    import torch

    if context.base.spec.rows != "any":
        raise PassFailed(
            f"training runs batches of any rows, and base.rows: {context.base.spec.rows} says that they share none; "
            "drop the pass"
        )
    if len(data) == 0:
        raise PassFailed(f"base '{context.base.name}' has no rows in its train split; training needs some")
    require_augmentable(schedule.augment, context.base.spec.inputs)
    threads = torch.get_num_threads()
    torch.set_num_threads(context.threads)
    try:
        module.to(context.device)
        objective.to(context.device)
        if (extra := objective.extra()) is not None:
            extra.to(context.device)
        order_kernels(module, torch.channels_last)
        with torch.random.fork_rng([0] if context.device != "cpu" else []), torch.enable_grad():
            run = TrainingRun(module, objective, schedule, _shared(callbacks, schedule), context)
            return run.to_the_end(data)
    except Exception as error:
        if isinstance(error, PassFailed) or not is_out_of_memory(error):
            raise
        text = f"memory ran out while training on batches of {schedule.batch} rows ({error}); lower the option 'batch'"
        raise PassFailed(text) from error
    finally:
        torch.set_num_threads(threads)
        order_kernels(module.cpu().eval(), torch.contiguous_format)


def _shared(callbacks: Sequence[TrainingCallback], schedule: TrainingOptions) -> Sequence[TrainingCallback]:
    """And what several processes have to tell each other."""
    if schedule.processes == 1:
        return callbacks
    if schedule.splits_weights:
        from leanserve.passes.toolkit.split_weights import SplitWeights

        return [SplitWeights(), *callbacks]
    from leanserve.passes.toolkit.processes import ShareStatistics, ShareSteps

    return [ShareStatistics(), *callbacks, ShareSteps()]


def order_kernels(module: nn.Module, order: torch.memory_format) -> None:
    """Store kernels of convolutions in this order; channels last, a small ResNet trains 1.4 times as fast on a CPU."""
    from torch import nn

    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            child.weight.data = child.weight.data.contiguous(memory_format=order)


class TrainingRun:
    """One training as callbacks see it."""

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        schedule: TrainingOptions,
        callbacks: Sequence[TrainingCallback],
        context: BuildContext,
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
        self._callbacks = callbacks
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
            write_checkpoint(self._checkpoint, self._whole_state())
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
        self.rows = self.all_rows = len(inputs[0])
        if self.schedule.processes > 1 and not self.schedule.splits_weights:
            from leanserve.passes.toolkit.processes import own_share

            inputs = tuple(own_share(item) for item in inputs)
            labels = None if labels is None else own_share(labels)
            self.rows = len(inputs[0])
        return inputs, labels

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

    def _whole_state(self) -> TrainingState:
        """Of all processes, where each has weights of its own."""
        if not self.schedule.splits_weights:
            return self._state()
        from leanserve.passes.toolkit.split_weights import gathered_state

        return gathered_state(self._state())

    def _resume(self) -> None:
        from leanserve.runtime.formats.tied_tensors import load_tensors

        found = read_training_checkpoint(self._checkpoint)
        if found is None or found["identity"] != self._identity():
            return
        if self.schedule.splits_weights:
            from leanserve.passes.toolkit.split_weights import own_state

            found = own_state(found)
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
