"""Two networks that learn from each other (Zhang et al., "Deep Mutual Learning", 2018): the objective of both."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from leanserve.passes.toolkit.teacher import MatchTeacher, floats_of
from leanserve.passes.toolkit.training_run import Objective


class LearnTogether(Objective):
    """The student learns from a peer, a copy of the base, which learns from the student and from the labels too."""

    def __init__(self, answers: MatchTeacher) -> None:
        self._answers = answers
        self._peer = copy.deepcopy(answers.teacher)

    def extra(self) -> nn.Module:
        return self._peer

    def to(self, device: str) -> None:
        self._answers.to(device)

    def loss(self, inputs: tuple[Tensor, ...], labels: Tensor | None) -> Tensor:
        ours, theirs = floats_of(self._answers.student(*inputs)), floats_of(self._peer(*inputs))
        return self._answers.compared(ours, _still(theirs), labels) + self._answers.compared(
            theirs, _still(ours), labels
        )


def _still(answers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(item.detach() for item in answers)
