"""The one training loop: everything that trains (recovery by distillation now, later other passes) calls `train`.

It exists once so that what is easy to get wrong is right once: a run that was interrupted goes on from its last epoch
and ends in the same weights as an undisturbed one, weights that a pass has set to zero stay zero, bfloat16 is used only
where the CPU has instructions for it, and whoever waits sees how far it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from leanserve.contracts import BuildContext, Data
from leanserve.errors import PassFailed
from leanserve.hardware import isa_flags
from leanserve.memory import is_out_of_memory
from leanserve.passes.toolkit.augmentation import AUGMENTATIONS, Augment
from leanserve.passes.toolkit.checkpoint import read_training_checkpoint, write_checkpoint

if TYPE_CHECKING:
    import torch
    from torch import nn

    Loss: TypeAlias = Callable[[tuple[torch.Tensor, ...], torch.Tensor | None], torch.Tensor]

FAST_BF16 = frozenset({"avx512_bf16", "amx_bf16"})
"""Instruction sets that train faster in bfloat16; ARM's `bf16` is left out because nobody has measured it here."""

CHECKPOINT = "training.safetensors"


class TrainingOptions(BaseModel):
    """The options of every pass that trains; a pass inherits them, so that they mean the same everywhere."""

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
    augment: Augment = "none"
    """Random changes of image inputs, fresh in every epoch."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """`auto` computes in bfloat16 where the CPU has instructions for it; weights are float32 in any case."""

    def resolved_precision(self, isa: frozenset[str]) -> Literal["float32", "bf16"]:
        """What `auto` means on a machine with these instruction sets."""
        if self.precision == "auto":
            return "bf16" if FAST_BF16 & isa else "float32"
        return self.precision


@dataclass(frozen=True, slots=True)
class Trained:
    """What happened: mean loss of the first and the last epoch, and the epoch from which the run was resumed."""

    first_loss: float
    last_loss: float
    resumed_from: int


def train(module: nn.Module, loss: Loss, options: TrainingOptions, context: BuildContext) -> Trained:
    """Train `module` in place on the base's train split and leave it in eval mode.

    `loss` gets the (augmented) inputs of a batch and its labels (`None` if the data has none) and returns a scalar; it
    runs under autocast. Exact zeros in a weight matrix or kernel are taken for a sparsity pattern and are kept, except
    where all of it is zero, which is an initialisation. After an interruption the same call with the same
    `context.scratch` goes on behind the last finished epoch and gives the same weights as an undisturbed run.

    Raises:
        PassFailed: the train split is empty, the augmentation does not fit the inputs, the loss is not finite, or
            there is no memory for the batches; or the base says that rows share no batch, where a step needs many.
    """
    import torch

    if context.base.spec.rows != "any":
        raise PassFailed(
            f"training runs batches of any rows, and base.rows: {context.base.spec.rows} says that they share none; "
            "drop the pass"
        )
    data = context.base.data("train")
    if len(data) == 0:
        raise PassFailed(f"base '{context.base.name}' has no rows in its train split; training needs some")
    threads = torch.get_num_threads()
    torch.set_num_threads(context.threads)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            return _Run(module, loss, options, context).to_the_end(data)
    except Exception as error:
        if isinstance(error, PassFailed) or not is_out_of_memory(error):
            raise
        text = f"memory ran out while training on batches of {options.batch} rows ({error}); lower the option 'batch'"
        raise PassFailed(text) from error
    finally:
        torch.set_num_threads(threads)
        module.eval()


class _Run:
    """The state of one training: optimiser, sparsity pattern, losses of the epochs that are done."""

    def __init__(self, module: nn.Module, loss: Loss, options: TrainingOptions, context: BuildContext) -> None:
        self._module = module
        self._loss = loss
        self._options = options
        self._context = context
        self._optimiser = _optimiser(module, options)
        self._kept = _sparsity(module)
        self._losses: list[float] = []
        self._checkpoint = context.scratch / CHECKPOINT

    def to_the_end(self, data: Data) -> Trained:
        self._resume()
        start = len(self._losses)
        for epoch in range(start, self._options.epochs):
            self._losses.append(self._epoch(epoch, data))
            self._save()
        return Trained(self._losses[0], self._losses[-1], start)

    def _epoch(self, epoch: int, data: Data) -> float:
        """One pass over the data. Its randomness depends on seed and epoch only, which is what makes resuming exact."""
        import torch

        seed = self._context.seed * 100_003 + epoch
        torch.manual_seed(seed)
        self._module.train()
        steps = max(1, len(data) // self._options.batch)
        total = 0.0
        for index, (inputs, labels) in enumerate(self._batches(data, seed)):
            step = epoch * steps + index
            value = self._step(inputs, labels, self._learning_rate(step, steps * self._options.epochs))
            if not math.isfinite(value):
                raise PassFailed(f"training diverged in epoch {epoch + 1} (loss {value}); lower learning_rate")
            total += value
            note = f"epoch {epoch + 1}/{self._options.epochs}, loss {total / (index + 1):.4f}"
            self._context.progress(step + 1, steps * self._options.epochs, note)
        return total / steps

    def _batches(self, data: Data, seed: int) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor | None]]:
        import torch

        augment = AUGMENTATIONS[self._options.augment]
        # The ragged last batch is left out (another one every epoch): batch norm cannot train on a single row.
        batches = islice(data.batches(self._options.batch, shuffle_seed=seed), max(1, len(data) // self._options.batch))
        for batch in batches:
            inputs = augment(tuple(torch.from_numpy(array) for array in batch.inputs))
            yield inputs, None if batch.labels is None else torch.from_numpy(batch.labels)

    def _step(self, inputs: tuple[torch.Tensor, ...], labels: torch.Tensor | None, rate: float) -> float:
        import torch

        bf16 = self._options.resolved_precision(isa_flags()) == "bf16"
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = self._loss(inputs, labels)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.zero_grad()
        torch.autograd.backward(loss)
        self._optimiser.step()
        with torch.no_grad():
            for weight, kept in self._kept:
                weight.mul_(kept)
        return loss.item()

    def _learning_rate(self, step: int, steps: int) -> float:
        rising = self._options.warmup * steps
        if step < rising:
            return self._options.learning_rate * (step + 1) / (rising + 1)
        return self._options.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))

    def _save(self) -> None:
        notes = {"options": self._options.model_dump_json(), "losses": self._losses}
        write_checkpoint(self._checkpoint, self._module, self._optimiser, notes)

    def _resume(self) -> None:
        found = read_training_checkpoint(self._checkpoint)
        if found is None or found.notes["options"] != self._options.model_dump_json():
            return
        found.restore(self._module, self._optimiser)
        self._losses = found.notes["losses"]


def _optimiser(module: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    """Weight decay only on matrices and kernels: on biases and normalisation it pulls towards a worse function."""
    import torch

    weights = [parameter.requires_grad_() for parameter in module.parameters() if parameter.is_floating_point()]
    groups = [
        {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
    ]
    if options.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=options.learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=options.learning_rate)


def _sparsity(module: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every weight with a sparsity pattern, and the mask of what is not zero in it."""
    masks = ((weight, weight.detach() != 0) for weight in module.parameters() if weight.ndim > 1)
    return [(weight, kept) for weight, kept in masks if bool(kept.any()) and not bool(kept.all())]
