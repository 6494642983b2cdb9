"""The options of every pass that trains, inherited, so that they mean the same everywhere."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from leanserve.contracts import BuildContext, ModelSpec
from leanserve.errors import PassFailed
from leanserve.passes.base import Need
from leanserve.passes.toolkit.augmentation import Augments

FAST_BF16 = frozenset({"avx512_bf16", "amx_bf16"})
"""Instruction sets that train faster in bfloat16; ARM's `bf16` is left out because nobody has measured it here."""


class TrainingOptions(BaseModel):
    """The schedule, and what all ways of training have."""

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
