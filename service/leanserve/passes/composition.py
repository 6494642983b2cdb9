"""May these passes follow one another? Checked when the config is read, before any work.

Two rules: state tags (a pass requires, forbids, produces and removes some) and stages, which do not go back, except
that training may stand before what it recovers the model from. Both hold along every line of parents: a variant goes on
where its parents ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import permutations
from typing import Self

from leanserve.passes.base import BASE_TAGS, Pass, Stage, Tag

MEANING: dict[Tag, str] = {
    "eager_module": "a plain torch module",
    "float_weights": "float32 weights",
    "exportable": "a model that can be exported to ONNX",
    "onnx_graph": "an ONNX graph",
    "runtime": "a runtime",
    "dynamic_ranges": "ranges that are found while running (quantize_static fixes them beforehand)",
}


@dataclass(frozen=True)
class Violation:
    """Why the pass at `position` (from 0) cannot stand there."""

    position: int
    message: str


@dataclass(frozen=True)
class ModelState:
    """What is known of a model after some passes, without making it: of an untouched base, its tags alone."""

    tags: frozenset[Tag] = BASE_TAGS
    highest: Pass | None = None
    """The pass of the latest stage; training does not count."""
    removed_by: Mapping[Tag, str] = field(default_factory=dict)
    produced_by: Mapping[Tag, str] = field(default_factory=dict)

    @classmethod
    def joined(cls, states: Sequence[Self]) -> Self:
        """Of a model made of several: it has the tags that all of them have, and what any has been through."""
        first, *others = states
        for other in others:
            highest = max((first.highest, other.highest), key=lambda step: step.stage if step else 0)
            removed, produced = {**other.removed_by, **first.removed_by}, {**other.produced_by, **first.produced_by}
            first = cls(first.tags & other.tags, highest, removed, produced)
        return first

    def objection(self, step: Pass) -> str | None:
        """Why a pass cannot follow; `None` if it can."""
        if self.highest is not None and step.stage < self.highest.stage:
            return _out_of_order(step, self.highest)
        for tag in sorted(step.requires - self.tags):
            culprit = (
                f"'{self.removed_by[tag]}' has removed it" if tag in self.removed_by else "the base does not give it"
            )
            return f"'{step.kind}' requires {MEANING[tag]} (tag '{tag}'), but {culprit}."
        for tag in sorted(step.forbids & self.tags):
            return (
                f"'{step.kind}' forbids {MEANING[tag]} (tag '{tag}'), which '{self.produced_by[tag]}' has already "
                "chosen."
            )
        return None

    def after(self, step: Pass) -> ModelState:
        """The state of what a pass makes of such a model."""
        counts = step.stage is not Stage.TRAINING and (self.highest is None or step.stage >= self.highest.stage)
        return ModelState(
            (self.tags - step.removes) | step.produces,
            step if counts else self.highest,
            {**self.removed_by, **dict.fromkeys(step.removes, step.kind)},
            {**self.produced_by, **dict.fromkeys(step.produces, step.kind)},
        )


UNTOUCHED = (ModelState(),)
"""The parents of a variant that begins with a torch base."""


def find_violation(passes: Sequence[Pass], parents: Sequence[ModelState] = UNTOUCHED) -> Violation | None:
    """The first pass that cannot stand where it does, with both passes, the tag and a legal order in the text."""
    violation = _first_violation(passes, parents)
    if violation is None:
        return None
    legal = _legal_order(passes, parents)
    remedy = (
        f"A legal order: {' -> '.join(legal)}." if legal else "No order of these passes is legal: drop one of them."
    )
    return Violation(violation.position, f"{violation.message} {remedy}")


def state_after(passes: Sequence[Pass], parents: Sequence[ModelState]) -> ModelState:
    """The state of a variant: its passes on the models of all its parents."""
    return reduce(lambda state, step: state.after(step), passes, ModelState.joined(parents))


def _first_violation(passes: Sequence[Pass], parents: Sequence[ModelState]) -> Violation | None:
    for position, step in enumerate(passes):
        for state in parents:
            if objection := state.objection(step):
                return Violation(position, objection)
        parents = (ModelState.joined(parents).after(step),)
    return None


def _out_of_order(step: Pass, highest: Pass) -> str:
    late, early = (f"'{item.kind}' ({item.stage.words})" for item in (highest, step))
    return f"{early} cannot come after {late}: structure first, then training, then numerics."


def _legal_order(passes: Sequence[Pass], parents: Sequence[ModelState]) -> list[str] | None:
    joining = 1 if passes[0].joins else 0
    first, others = list(passes[:joining]), sorted(passes[joining:], key=lambda step: step.stage)
    orders = [others] if len(others) > 6 else [others, *map(list, permutations(others))]
    for candidate in ([*first, *order] for order in orders):
        if _first_violation(candidate, parents) is None:
            return [step.kind for step in candidate]
    return None
