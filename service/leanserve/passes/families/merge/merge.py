"""A model soup: one model with the averaged weights of several (Wortsman et al. 2022).

Models that went on from the same weights and were trained differently (another learning rate, another loss, another
augmentation) often lie in one valley, and their mean answers better than the best of them, at the cost of one. Batch
norm is estimated anew, for the statistics of a mean are not the mean of the statistics. What it costs: the training of
every parent. Models that were trained from different starts have nothing to average: the soup is worse than any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt

from leanserve.contracts import BuildContext, Model
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied, Need, Pass, Stage, Tag

if TYPE_CHECKING:
    from torch import Tensor

    from leanserve.contracts import TorchModel

    Weights = Mapping[str, Tensor]


REMEDY = "merge variants that were made by the same passes up to their training"


class Merge(Pass):
    """Average the weights of all parents, or of those that do the average good."""

    kind: Literal["merge"] = "merge"
    method: Literal["average", "greedy"] = "average"
    """`greedy`: begin with the parent that is best on the calibration split and take in the others, the better first,
    each only if the soup does not get worse there."""
    samples: PositiveInt = 256
    """Calibration rows to re-estimate batch norm on."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.TRAINING
    joins: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"})

    @property
    def evaluates(self) -> bool:
        return self.method == "greedy"

    def join(self, models: Sequence[Model], context: BuildContext) -> Applied:
        order: Sequence[int] = range(len(models))
        if self.method == "average":
            made, taken = self._soup(models, order, context), list(order)
            facts: dict[str, float] = {}
        else:
            made, taken, facts = self._greedy(models, context)
        context.progress(len(models), len(models), f"{len(taken)} of {len(models)} parents merged")
        return Applied(made, {"parents": [index + 1 for index in taken]}, {"merged": len(taken), **facts})

    def _greedy(self, models: Sequence[Model], context: BuildContext) -> tuple[TorchModel, list[int], dict[str, float]]:
        """The soup, the parents in it, and what the best parent and the soup are worth on the calibration split."""
        alone = [context.evaluate(model).value for model in models]
        best, *others = sorted(range(len(models)), key=lambda index: -alone[index])
        taken, value = [best], alone[best]
        made = self._soup(models, taken, context)
        for done, index in enumerate(others, start=1):
            context.progress(done, len(models), f"{len(taken)} of {done} parents merged")
            candidate = self._soup(models, [*taken, index], context)
            reached = context.evaluate(candidate).value
            if reached >= value:
                made, taken, value = candidate, [*taken, index], reached
        return made, taken, {"best_parent": alone[best], "soup": value}

    def _soup(self, models: Sequence[Model], chosen: Sequence[int], context: BuildContext) -> TorchModel:
        """The mean of the chosen parents, in double precision; whole numbers are those of the first of them.

        A weight stays zero where it does in all of them.
        """
        import torch

        from leanserve.passes.toolkit.activations import refit_batch_norm
        from leanserve.passes.toolkit.structure import copy_of

        made = copy_of(models[chosen[0]], self.kind)
        if len(chosen) == 1:
            return made
        masks = dict(made.masks)
        own: Weights = made.module.state_dict()
        sums = {name: tensor.double() for name, tensor in own.items() if tensor.is_floating_point()}
        for index in chosen[1:]:
            parent = copy_of(models[index], self.kind)
            other: Weights = parent.module.state_dict()
            if parent.spec != made.spec:
                raise PassFailed(f"parents {chosen[0] + 1} and {index + 1} take or give other tensors: {REMEDY}")
            _check_alike(own, other, chosen[0], index)
            masks = {name: mask | parent.masks[name] for name, mask in masks.items() if name in parent.masks}
            for name in sums:
                sums[name] += other[name]
        with torch.no_grad():
            for name, total in sums.items():
                own[name].copy_(total / len(chosen))
        layers = {name.rpartition(".")[0] for name in own}
        made = replace(made, masks=masks)
        refit_batch_norm(made, layers, context.base.data("calibration", self.samples, made.spec))
        return made


def _check_alike(one: Weights, other: Weights, first: int, second: int) -> None:
    """Raises `PassFailed` where two parents, given by their places from 0, differ in names or shapes of weights."""
    for name in sorted(one.keys() ^ other.keys()):
        have, lacks = (first, second) if name in one else (second, first)
        raise PassFailed(f"parent {have + 1} has the weight '{name}' and parent {lacks + 1} has not; {REMEDY}")
    for name, tensor in one.items():
        if tensor.shape != other[name].shape:
            shapes = f"{list(tensor.shape)} in parent {first + 1} and {list(other[name].shape)} in parent {second + 1}"
            raise PassFailed(f"the weight '{name}' is {shapes}; {REMEDY}")
