"""One model of several: the mean of their weights, an arc between two, or a sum of what each has learned.

Models that went on from the same weights and were trained differently (another learning rate, another loss, another
augmentation) often lie in one valley, and their mean answers better than the best of them, at the cost of one
(`average`, `greedy`; Wortsman et al., "Model Soups", 2022). `slerp` keeps the length of weights that a mean shortens.
`task_arithmetic`, `ties` and `dare` add up what models have learned beyond a common ancestor, their first parent.

Batch norm is estimated anew, for the statistics of a mean are not the mean of the statistics; layers without it are
given back how much they vary by `repair`. What it costs: the training of every parent. Models that were trained from
different starts have nothing to average until `rebasin` has put their channels into one order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from leanserve.contracts import BuildContext, Json, Model
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied, Need, Pass, Stage, Tag

if TYPE_CHECKING:
    from torch import Tensor

    from leanserve.contracts import TorchModel

    Weights = Mapping[str, Tensor]


REMEDY = "merge variants that were made by the same passes up to their training"


class Merge(Pass):
    """Mix the weights of all parents, or of those that do the mean good."""

    kind: Literal["merge"] = "merge"
    method: Literal["average", "greedy", "slerp", "task_arithmetic", "ties", "dare"] = "average"
    """`greedy`: begin with the parent that is best on the calibration split and take in the others, the better first,
    each only if the soup does not get worse there."""
    weights: tuple[float, ...] | None = None
    """One number per parent (task methods: per parent after the first). Equal shares by default; of `task_arithmetic`
    and `dare` 1 each, and below 0 what a model has learned is taken away."""
    density: float | None = Field(default=None, gt=0, le=1)
    """Of `ties` and `dare`: the share of each task vector that is kept; 0.2 by default."""
    repair: bool = False
    """Set mean and spread of every hidden layer's outputs to the average of the parents'."""
    samples: PositiveInt = 256
    """Calibration rows to re-estimate batch norm on, and for `repair`."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.TRAINING
    joins: ClassVar[bool] = True

    @model_validator(mode="after")
    def _options_of_the_method(self) -> Self:
        if self.density is not None and self.method not in ("ties", "dare"):
            raise ValueError(f"density says how much of a task vector ties and dare keep; drop it with {self.method}")
        if self.weights is not None and self.method == "greedy":
            raise ValueError("greedy finds out which parents count; drop weights, or take another method")
        shares = () if self._by_tasks or self.weights is None else self.weights
        if shares and (min(shares) < 0 or sum(shares) <= 0):
            raise ValueError(f"weights of {self.method} are shares: none below 0, and not all of them 0")
        if self.repair and self.method not in ("average", "slerp"):
            raise ValueError(f"repair goes by the mean of the parents, which {self.method} does not make; drop it")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"})

    @property
    def evaluates(self) -> bool:
        return self.method == "greedy"

    @property
    def _by_tasks(self) -> bool:
        return self.method in ("task_arithmetic", "ties", "dare")

    def join(self, models: Sequence[Model], context: BuildContext) -> Applied:
        from leanserve.passes.toolkit.barrier import barrier_of

        order: Sequence[int] = range(len(models))
        facts: dict[str, float] = {}
        if self.method == "greedy":
            made, taken, facts = self._greedy(models, context)
        else:
            made, taken = self._mixed(models, context), list(order)
        context.progress(len(models), len(models), f"{len(taken)} of {len(models)} parents merged")
        decisions: dict[str, Json] = {"parents": [index + 1 for index in taken]}
        if len(models) == 2 and not self._by_tasks:
            curve = self._curve(models, context)
            decisions["curves"] = {"between the parents": curve}
            facts |= {"barrier": barrier_of(curve)}
        return Applied(made, decisions, {"merged": len(taken), **facts})

    def _curve(self, models: Sequence[Model], context: BuildContext) -> list[float]:
        """The distance from the base's answers on the straight way between two parents."""
        from leanserve.passes.toolkit.barrier import curve_between
        from leanserve.passes.toolkit.structure import copy_of

        one, other = (copy_of(model, self.kind) for model in models)
        return curve_between(one, other, context.base, context.base.data("calibration", self.samples, one.spec))

    def _mixed(self, models: Sequence[Model], context: BuildContext) -> TorchModel:
        shares = self._shares(len(models))
        if self.method == "average":
            made = self._soup(models, range(len(models)), shares, context)
        else:
            made = self._by_tensor(models, shares, context)
        return self._repaired(made, models, shares, context) if self.repair else made

    def _shares(self, parents: int) -> list[float]:
        """What each parent counts; of task methods, each but the first."""
        count = parents - 1 if self._by_tasks else parents
        if count < (1 if self._by_tasks else 2) or (self.method == "slerp" and count != 2):
            wanted = "exactly two parents" if self.method == "slerp" else "at least two parents"
            raise PassFailed(f"method: {self.method} takes {wanted}, and the variant has {parents}")
        weights = self.weights or (1.0,) * count
        if len(weights) != count:
            first = " after the first, which is their ancestor" if self._by_tasks else ""
            raise PassFailed(f"weights: {len(weights)} numbers for {count} parents{first}; give one of each")
        return list(weights) if self._by_tasks else [weight / sum(weights) for weight in weights]

    def _greedy(self, models: Sequence[Model], context: BuildContext) -> tuple[TorchModel, list[int], dict[str, float]]:
        """The soup, the parents in it, and what the best parent and the soup are worth on the calibration split."""
        alone = [context.evaluate(model).value for model in models]
        best, *others = sorted(range(len(models)), key=lambda index: -alone[index])
        taken, value = [best], alone[best]
        made = self._soup(models, taken, [1.0], context)
        for done, index in enumerate(others, start=1):
            context.progress(done, len(models), f"{len(taken)} of {done} parents merged")
            more = [*taken, index]
            candidate = self._soup(models, more, [1 / len(more)] * len(more), context)
            reached = context.evaluate(candidate).value
            if reached >= value:
                made, taken, value = candidate, more, reached
        return made, taken, {"best_parent": alone[best], "soup": value}

    def _soup(
        self, models: Sequence[Model], chosen: Sequence[int], shares: Sequence[float], context: BuildContext
    ) -> TorchModel:
        """The mean of the chosen parents, in double precision; whole numbers are those of the first of them.

        A weight stays zero where it does in all of them. Parents are loaded one after another.
        """
        from leanserve.passes.toolkit.structure import copy_of

        made = copy_of(models[chosen[0]], self.kind)
        if len(chosen) == 1:
            return made
        own: Weights = made.module.state_dict()
        sums = {name: tensor.double() * shares[0] for name, tensor in own.items() if tensor.is_floating_point()}
        for index, share in zip(chosen[1:], shares[1:], strict=True):
            parent = copy_of(models[index], self.kind)
            made = _joined(made, parent, chosen[0], index)
            other: Weights = parent.module.state_dict()
            for name in sums:
                sums[name] += other[name].double() * share
        return self._filled(made, sums, context)

    def _by_tensor(self, models: Sequence[Model], shares: Sequence[float], context: BuildContext) -> TorchModel:
        """What needs the tensors of all parents at once."""
        import torch

        from leanserve.passes.toolkit.structure import copy_of

        made = first = copy_of(models[0], self.kind)
        states: list[Weights] = []
        for index, model in enumerate(models):
            parent = copy_of(model, self.kind)
            made = _joined(made, parent, 0, index)
            states.append(parent.module.state_dict())
        named = dict(first.module.named_parameters())  # those of a tie once, so that chance treats them alike
        with torch.random.fork_rng([]):
            torch.manual_seed(context.seed)
            mixed = {name: self._mix([state[name].double() for state in states], shares) for name in named}
        return self._filled(made, mixed, context)

    def _mix(self, tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
        from leanserve.passes.toolkit.mixing import slerp, task_sum

        if self.method == "slerp":
            return slerp(tensors[0], tensors[1], shares[1])
        assert self.method in ("task_arithmetic", "ties", "dare")
        ancestor, *learned = tensors
        return ancestor + task_sum(self.method, [item - ancestor for item in learned], shares, self.density or 0.2)

    def _filled(self, made: TorchModel, values: Weights, context: BuildContext) -> TorchModel:
        """The model with these weights and with batch norm that suits them."""
        import torch

        from leanserve.passes.toolkit.activations import refit_batch_norm

        own: Weights = made.module.state_dict()
        with torch.no_grad():
            for name, value in values.items():
                own[name].copy_(value)
            for name, mask in made.masks.items():
                own[name].masked_fill_(~mask, 0)
        layers = {name.rpartition(".")[0] for name in own}
        refit_batch_norm(made, layers, context.base.data("calibration", self.samples, made.spec))
        return made

    def _repaired(
        self, made: TorchModel, models: Sequence[Model], shares: Sequence[float], context: BuildContext
    ) -> TorchModel:
        from leanserve.passes.toolkit.activations import refit_batch_norm
        from leanserve.passes.toolkit.repair import average_spread, repair, spreads
        from leanserve.passes.toolkit.structure import copy_of

        data = context.base.data("calibration", self.samples, made.spec)
        goals = average_spread([spreads(copy_of(model, self.kind), data) for model in models], shares)
        repair(made, goals, data)
        refit_batch_norm(made, list(goals), data)
        return made


def _joined(made: TorchModel, parent: TorchModel, first: int, second: int) -> TorchModel:
    """`made` with the zeros that both have.

    Raises:
        PassFailed: they differ in names or shapes of weights, or in what they take and give.
    """
    if parent.spec != made.spec:
        raise PassFailed(f"parents {first + 1} and {second + 1} take or give other tensors: {REMEDY}")
    _check_alike(made.module.state_dict(), parent.module.state_dict(), first, second)
    masks = {name: mask | parent.masks[name] for name, mask in made.masks.items() if name in parent.masks}
    return replace(made, masks=masks)


def _check_alike(one: Weights, other: Weights, first: int, second: int) -> None:
    """Raises `PassFailed` where two parents, given by their places from 0, differ in names or shapes of weights."""
    for name in sorted(one.keys() ^ other.keys()):
        have, lacks = (first, second) if name in one else (second, first)
        raise PassFailed(f"parent {have + 1} has the weight '{name}' and parent {lacks + 1} has not; {REMEDY}")
    for name, tensor in one.items():
        if tensor.shape != other[name].shape:
            shapes = f"{list(tensor.shape)} in parent {first + 1} and {list(other[name].shape)} in parent {second + 1}"
            raise PassFailed(f"the weight '{name}' is {shapes}; {REMEDY}")
