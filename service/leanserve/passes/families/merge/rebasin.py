"""Puts the channels of a second model into the order of a first, so that the two can be averaged.

The answers of the second model stay what they are: only the order in which it computes changes (Ainsworth et al., "Git
Re-Basin", 2023). On the straight way between two networks that were trained apart the loss rises to a barrier; after
this it is far lower. It costs seconds and changes nothing by itself: a `merge` of both must follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveInt

from leanserve.contracts import BuildContext, Model
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied, Need, Pass, Stage, Tag

if TYPE_CHECKING:
    from leanserve.contracts import TorchModel


class Rebasin(Pass):
    """The second of two parents, with its hidden channels in the order of the first."""

    kind: Literal["rebasin"] = "rebasin"
    match: Literal["weight", "activation"] = "activation"
    """Whether the weights become most alike, or what channels answer to calibration rows."""
    samples: PositiveInt = 256
    """Calibration rows for `activation`, and to measure the barrier on."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.TRAINING
    joins: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "torch-pruning", "scipy")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"})

    def join(self, models: Sequence[Model], context: BuildContext) -> Applied:
        from leanserve.passes.toolkit.barrier import barrier_of, curve_between
        from leanserve.passes.toolkit.permutations import match_activations, match_weights, permutation_groups
        from leanserve.passes.toolkit.structure import copy_of

        if len(models) != 2:
            raise PassFailed(f"rebasin takes exactly two parents, and the variant has {len(models)}")
        one, other = (copy_of(model, self.kind) for model in models)
        _check(one, other)
        groups = permutation_groups(one)
        if not groups:
            raise PassFailed("rebasin finds no hidden channels in this model whose order is free; drop the pass")
        data = context.base.data("calibration", self.samples, one.spec)
        before = curve_between(one, other, context.base, data)
        if self.match == "weight":
            orders = match_weights(one, other, groups, context.seed)
        else:
            orders = match_activations(one, other, groups, data)
        masks = {name: mask.clone() for name, mask in other.masks.items()}
        made = replace(copy_of(other, self.kind), masks=masks)
        for group in groups:
            group.permute(made.module.state_dict(), orders[group.root])
            group.permute(masks, orders[group.root])
        after = curve_between(one, made, context.base, data)
        moved = sum(int((order != order.sort().values).sum()) for order in orders.values())
        facts = {"barrier_before": barrier_of(before), "barrier_after": barrier_of(after), "channels_moved": moved}
        return Applied(made, {"curves": {"before": before, "after": after}}, facts)


def _check(one: TorchModel, other: TorchModel) -> None:
    shapes = [{name: list(item.shape) for name, item in model.module.state_dict().items()} for model in (one, other)]
    if one.spec != other.spec or shapes[0] != shapes[1]:
        names = sorted(name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
        told = f"they differ in '{names[0]}'" if names else "they take or give other tensors"
        raise PassFailed(
            f"rebasin orders the channels of two models of one structure, and {told}; give it such parents"
        )
