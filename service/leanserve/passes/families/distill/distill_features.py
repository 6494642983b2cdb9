"""Distillation of what is inside: the student learns to have the base's features, not only its answers.

`hints` compares features (Romero et al., "FitNets", 2015), `attention` where they are strong (Zagoruyko and Komodakis
2017), `relations` how far rows are from each other (Park et al. 2019). It buys accuracy per epoch for students that
kept the base's structure (pruned, factorised); a student of another kind wants `relations`, or nothing of it. It costs
the memory of the features; projections between widths are trained along and thrown away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import PositiveFloat

from leanserve.contracts import BuildContext, Model
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied, Pass, Stage, Tag
from leanserve.passes.toolkit.training import train
from leanserve.passes.toolkit.training_options import RecoveryOptions

if TYPE_CHECKING:
    from torch import nn


class DistillFeatures(RecoveryOptions, Pass):
    """Train on the base's features and answers to the train split."""

    kind: Literal["distill_features"] = "distill_features"
    method: Literal["hints", "attention", "relations"] = "hints"
    layers: Mapping[str, str] | None = None
    """The student's layers and those of the base that they learn from; by default the children of lists and sequences
    that both have under one name."""
    weight: PositiveFloat = 1.0
    """Of the features beside the answers."""
    temperature: PositiveFloat = 4.0
    """As in `distill`, for the answers."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.TRAINING
    isa_bound: ClassVar[bool] = True  # `precision: auto` trains differently where the CPU has bfloat16

    def apply(self, model: Model, context: BuildContext) -> Applied:
        import torch

        from leanserve.passes.toolkit.callbacks import recovery_callbacks
        from leanserve.passes.toolkit.features import MatchFeatures
        from leanserve.passes.toolkit.masks import masks_of
        from leanserve.passes.toolkit.structure import copy_of
        from leanserve.passes.toolkit.teacher import MatchTeacher, TeacherTerms, require_inputs_of

        student = copy_of(model, self.kind)
        student = replace(student, masks=masks_of(student))
        require_inputs_of(context.base, student, self.kind)
        terms = TeacherTerms("auto", self.temperature, self.alpha, self.pseudo_labels)
        answers = MatchTeacher(student, context.base, terms)
        layers = self._pairs(student.module, answers.teacher)
        with torch.random.fork_rng([]):
            torch.manual_seed(context.seed)
            objective = MatchFeatures(answers, student, layers, self.method, self.weight)
        callbacks = recovery_callbacks(student, self, context)
        with objective.ours.watching(), objective.theirs.watching():
            outcome = train(student.module, objective, context.base.data("train"), self, callbacks, context)
        facts = {"first_loss": outcome.first_loss, "last_loss": outcome.last_loss, "epochs": outcome.epochs}
        return Applied(student, {"layers": dict(layers)}, facts)

    def _pairs(self, student: nn.Module, teacher: nn.Module) -> Mapping[str, str]:
        from leanserve.passes.toolkit.features import stack_layers

        if self.layers is None:
            both = [name for name in stack_layers(student) if name in set(stack_layers(teacher))]
            if not both:
                raise PassFailed("layers: student and base have no list or sequence of blocks in common; name layers")
            return {name: name for name in both}
        for whose, names, module in (
            ("student", self.layers.keys(), student),
            ("base", self.layers.values(), teacher),
        ):
            known = dict(module.named_modules())
            if unknown := [name for name in names if name not in known]:
                raise PassFailed(
                    f"layers: the {whose} has no layer '{unknown[0]}'; it has {', '.join(list(known)[1:9])}"
                )
        return self.layers
