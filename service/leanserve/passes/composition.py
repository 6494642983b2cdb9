"""May these passes follow one another? Checked when the config is read, before any work.

Two rules: state tags (a pass requires, forbids, produces and removes some) and stages, which do not go back, except
that training may stand before what it recovers the model from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

from leanserve.passes.base import BASE_TAGS, Pass, Stage, Tag

MEANING: dict[Tag, str] = {
    "eager_module": "a plain torch module",
    "float_weights": "float32 weights",
    "exportable": "a model that can be exported to ONNX",
    "onnx_graph": "an ONNX graph",
    "runtime": "a runtime",
}


@dataclass(frozen=True)
class Violation:
    """Why the pass at `position` (from 0) cannot stand there."""

    position: int
    message: str


def find_violation(passes: Sequence[Pass], tags: frozenset[Tag] = BASE_TAGS) -> Violation | None:
    """The first pass that cannot stand where it does, with both passes, the tag and a legal order in the text."""
    violation = _first_violation(passes, tags)
    if violation is None:
        return None
    legal = _legal_order(passes, tags)
    remedy = (
        f"A legal order: {' -> '.join(legal)}." if legal else "No order of these passes is legal: drop one of them."
    )
    return Violation(violation.position, f"{violation.message} {remedy}")


def _first_violation(passes: Sequence[Pass], tags: frozenset[Tag]) -> Violation | None:
    highest: Pass | None = None
    removed_by: dict[Tag, str] = {}
    produced_by: dict[Tag, str] = {}
    for position, step in enumerate(passes):
        if highest is not None and step.stage < highest.stage:
            return Violation(position, _out_of_order(step, highest))
        for tag in sorted(step.requires - tags):
            culprit = f"'{removed_by[tag]}' has removed it" if tag in removed_by else "the base does not give it"
            return Violation(position, f"'{step.kind}' requires {MEANING[tag]} (tag '{tag}'), but {culprit}.")
        for tag in sorted(step.forbids & tags):
            return Violation(
                position,
                f"'{step.kind}' forbids {MEANING[tag]} (tag '{tag}'), which '{produced_by[tag]}' has already chosen.",
            )
        tags = (tags - step.removes) | step.produces
        removed_by |= dict.fromkeys(step.removes, step.kind)
        produced_by |= dict.fromkeys(step.produces, step.kind)
        if step.stage is not Stage.TRAINING:
            highest = step
    return None


def _out_of_order(step: Pass, highest: Pass) -> str:
    late, early = (f"'{item.kind}' ({item.stage.words})" for item in (highest, step))
    return f"{early} cannot come after {late}: structure first, then training, then numerics."


def _legal_order(passes: Sequence[Pass], tags: frozenset[Tag]) -> list[str] | None:
    by_stage = sorted(passes, key=lambda step: step.stage)
    candidates = [by_stage] if len(passes) > 6 else [by_stage, *map(list, permutations(by_stage))]
    for candidate in candidates:
        if _first_violation(candidate, tags) is None:
            return [step.kind for step in candidate]
    return None
