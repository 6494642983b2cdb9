"""Scores that learn which weights go: those that training moves towards zero (Sanh et al., "Movement Pruning", 2020).

Every weight, or block of weights, has a score, and the highest count. Gradients reach a score as if nothing had been
cut: it falls where the loss wants the weight smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leanserve.passes.toolkit.sparsity import masks_by_score
from leanserve.passes.toolkit.teacher import MatchTeacher, floats_of
from leanserve.passes.toolkit.training_run import Objective, TrainingCallback, TrainingRun


class MovementScores(Objective):
    """A teacher's answers, of a student that has only the weights with the highest scores.

    A score is that of a block of `block` outputs times inputs; kernels are laid flat, rows are outputs.
    """

    def __init__(
        self, answers: MatchTeacher, weights: Mapping[str, nn.Parameter], sparsity: float, block: tuple[int, int]
    ) -> None:
        self._answers, self._weights, self._sparsity, self._block = answers, weights, sparsity, block
        self.share = 0.0
        """Of the final sparsity."""
        shapes = {name: _grid(weight, block) for name, weight in weights.items()}
        zeros = {_key(name): nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
        self._scores = nn.ParameterDict(zeros)

    def extra(self) -> nn.Module:
        return self._scores

    def to(self, device: str) -> None:
        self._answers.to(device)

    def loss(self, inputs: tuple[Tensor, ...], labels: Tensor | None) -> Tensor:
        with torch.no_grad():
            wanted = floats_of(self._answers.teacher(*inputs))
        masks = self.masks()
        masked = {
            name: weight * _Straight.apply(self._spread(name), masks[name].to(weight.dtype))  # type: ignore[no-untyped-call]
            for name, weight in self._weights.items()
        }
        given = functional_call(self._answers.student, masked, inputs)
        return self._answers.compared(floats_of(given), wanted, labels)

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """The weights that stay, at the present share of the sparsity."""
        scores = {name: self._scores[_key(name)].detach() for name in self._weights}
        chosen = masks_by_score(scores, self._sparsity * self.share, "local")
        return {name: _spread(chosen[name], self._weights[name], self._block) for name in self._weights}

    def _spread(self, name: str) -> Tensor:
        return _spread(self._scores[_key(name)], self._weights[name], self._block)


class GrowMovement(TrainingCallback):
    """The share of the sparsity along the cubic 1 - (1 - t)^3, up to the share `ramp` of the training."""

    def __init__(self, scores: MovementScores, ramp: float) -> None:
        self._scores, self._ramp = scores, ramp

    def begin_epoch(self, run: TrainingRun) -> None:
        self._grow(run)

    def end_step(self, run: TrainingRun) -> None:
        self._grow(run)

    def end(self, run: TrainingRun) -> None:  # noqa: ARG002
        self._scores.share = 1.0

    def _grow(self, run: TrainingRun) -> None:
        last = max(1, round(self._ramp * run.steps))
        self._scores.share = 1 - (1 - min(1.0, run.step / last)) ** 3


class _Straight(torch.autograd.Function):
    """The mask on the way forth; on the way back, gradients reach the scores as they are."""

    @staticmethod
    def forward(_: Any, scores: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG004
        return mask.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _key(name: str) -> str:
    return name.replace(".", "/")


def _grid(weight: Tensor, block: tuple[int, int]) -> tuple[int, int]:
    rows, columns = weight.flatten(1).shape
    return -(-rows // block[0]), -(-columns // block[1])


def _spread(values: Tensor, weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Values of blocks as values of weights."""
    rows, columns = weight.flatten(1).shape
    wide = values.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return wide.reshape(weight.shape)
