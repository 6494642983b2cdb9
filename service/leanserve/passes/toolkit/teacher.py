"""Answering like the base: the objective of distillation, for every pass that trains towards it.

Hinton, Vinyals and Dean 2015: the teacher's soft answers say more per row than labels do, and need none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanserve.contracts import Base, ModelSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.toolkit.objectives import BY_MEANING, MEASURES, LossKind, Output, cross_entropy, logits
from leanserve.passes.toolkit.spread import channel_axis, channel_scales
from leanserve.passes.toolkit.training import order_kernels
from leanserve.passes.toolkit.training_run import Objective

SPREAD_ROWS = 256
"""Rows of the train split on which the teacher shows how much its outputs vary."""


@dataclass(frozen=True)
class TeacherTerms:
    """How a student is compared: the loss of every output, the temperature of `kl`, the share of hard labels."""

    loss: Literal["auto"] | LossKind = "auto"
    temperature: float = 4.0
    alpha: float = 0.0
    pseudo_labels: float | None = None
    """Probability from which on the teacher's answer is the label of a row that has none."""

    def measures(self, spec: ModelSpec) -> dict[int, LossKind]:
        """By position, how each output is compared; whole numbers have no gradient and are left out."""
        floats = ((index, item) for index, item in enumerate(spec.outputs) if item.dtype.startswith("float"))
        return {index: BY_MEANING[item.meaning] if self.loss == "auto" else self.loss for index, item in floats}


def require_inputs_of(base: Base, student: TorchModel, kind: str) -> None:
    """Check that teacher and student can be shown the same rows.

    Raises:
        PassFailed: passes before have changed what the student takes.
    """
    theirs, ours = ([(item.name, item.dtype, item.shape) for item in spec.inputs] for spec in (base.spec, student.spec))
    if theirs != ours:
        raise PassFailed(f"{kind} shows the base the rows of its student, whose inputs were changed; train before that")


class MatchTeacher(Objective):
    """The student's distance from a teacher's answers to the same (augmented) inputs, and from the labels.

    The teacher is the base if no other is given.
    """

    def __init__(self, student: TorchModel, base: Base, terms: TeacherTerms, teacher: nn.Module | None = None) -> None:
        self.student = student.module
        self.teacher = (base.torch_module() if teacher is None else teacher).eval()
        self._alpha, self._sure = terms.alpha, terms.pseudo_labels
        self._labelled = student.spec.labelled
        self._measures = terms.measures(student.spec)
        scales = _scales(self.teacher, student.spec, base) if "mse" in self._measures.values() else {}
        self._outputs = [
            Output(item.meaning, scales.get(index, torch.ones(1)), terms.temperature)
            for index, item in enumerate(student.spec.outputs)
        ]

    def teachers(self) -> Sequence[nn.Module]:
        return [self.teacher]

    def to(self, device: str) -> None:
        self.teacher.to(device)
        order_kernels(self.teacher, torch.channels_last)
        self._outputs = [item._replace(scales=item.scales.to(device)) for item in self._outputs]

    def loss(self, inputs: tuple[Tensor, ...], labels: Tensor | None) -> Tensor:
        with torch.no_grad():
            wanted = floats_of(self.teacher(*inputs))
        return self.compared(floats_of(self.student(*inputs)), wanted, labels)

    def compared(self, given: tuple[Tensor, ...], wanted: tuple[Tensor, ...], labels: Tensor | None) -> Tensor:
        """The loss of answers, beside those of a teacher and the labels."""
        distance = self.distance(given, wanted)
        if not self._alpha:
            return distance
        hard = self._hard(given[self._labelled], wanted[self._labelled], labels)
        return self._alpha * hard + (1 - self._alpha) * distance

    def _hard(self, given: Tensor, wanted: Tensor, labels: Tensor | None) -> Tensor:
        """The cross entropy of labels; of a row without one, that of the teacher's answer where it is sure."""
        meaning = self._outputs[self._labelled].meaning
        if labels is not None:
            return cross_entropy(given, labels, meaning)
        if self._sure is None:
            raise PassFailed(
                f"alpha is {self._alpha}, but the train split has no labels; set it to 0, or pseudo_labels"
            )
        chances, answers = logits(wanted, meaning).softmax(-1).max(-1)
        sure = chances >= self._sure
        if not bool(sure.any()):
            return given.sum() * 0
        return cross_entropy(given[sure], answers[sure], meaning) * sure.float().mean()

    def distance(self, given: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> Tensor:
        """How far answers are from others, each output by its measure."""
        distances = [MEASURES[measure](given[i], wanted[i], self._outputs[i]) for i, measure in self._measures.items()]
        return torch.stack(distances).sum()


class Committee(nn.Module):
    """Several teachers as one: the mean of their probabilities, directions or values."""

    def __init__(self, teachers: Sequence[nn.Module], spec: ModelSpec) -> None:
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        self._meanings = [item.meaning for item in spec.outputs]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Logits of classes become those of the mean probabilities."""
        answers = [floats_of(teacher(*inputs)) for teacher in self.teachers]
        return tuple(
            _mean(torch.stack(parts), meaning)
            for parts, meaning in zip(zip(*answers, strict=True), self._meanings, strict=True)
        )


def _mean(answers: Tensor, meaning: str) -> Tensor:
    if meaning in ("logits", "log_probabilities"):
        return answers.log_softmax(-1).logsumexp(0) - math.log(len(answers))
    return F.normalize(answers, dim=-1).mean(0) if meaning == "embedding" else answers.mean(0)


def floats_of(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Outputs in float32: softmax and norms of bfloat16 lose what distillation is about."""
    return tuple(item.float() for item in (outputs if isinstance(outputs, tuple | list) else (outputs,)))


def _scales(teacher: nn.Module, spec: ModelSpec, base: Base) -> dict[int, Tensor]:
    """By position of the output, what an error of each channel is relative to, shaped to be divided by."""
    batches = base.data("train", SPREAD_ROWS).batches(32)
    with torch.no_grad():
        answers = [floats_of(teacher(*map(torch.from_numpy, batch.inputs))) for batch in batches]
    found = {}
    for index, parts in enumerate(zip(*answers, strict=True)):
        axis = channel_axis(spec.outputs[index].shape)
        scales = torch.from_numpy(channel_scales([part.numpy() for part in parts], axis)).float()
        found[index] = scales.reshape([-1 if place == axis else 1 for place in range(parts[0].ndim)])
    return found
