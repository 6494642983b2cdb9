"""Distillation from several teachers at once: the first parent learns from the mean of the others' answers.

An ensemble answers better than each of its members and costs the sum of them; a student has its answers at the cost of
one (Hinton, Vinyals and Dean 2015). It pays where the teachers differ: other seeds, other data, other augmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import PositiveFloat

from leanserve.contracts import BuildContext, Model
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied, Pass, Stage, Tag
from leanserve.passes.toolkit.training import train
from leanserve.passes.toolkit.training_options import RecoveryOptions


class DistillEnsemble(RecoveryOptions, Pass):
    """Train the first parent on the mean answers of all others."""

    kind: Literal["distill_ensemble"] = "distill_ensemble"
    temperature: PositiveFloat = 4.0
    """As in `distill`."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.TRAINING
    joins: ClassVar[bool] = True
    isa_bound: ClassVar[bool] = True  # `precision: auto` trains differently where the CPU has bfloat16

    def join(self, models: Sequence[Model], context: BuildContext) -> Applied:
        from leanserve.passes.toolkit.callbacks import recovery_callbacks
        from leanserve.passes.toolkit.masks import masks_of
        from leanserve.passes.toolkit.structure import copy_of
        from leanserve.passes.toolkit.teacher import Committee, MatchTeacher, TeacherTerms, require_inputs_of

        if len(models) < 2:
            raise PassFailed("distill_ensemble takes the student and its teachers as parents, and the variant has one")
        student, *teachers = (copy_of(model, self.kind) for model in models)
        student = replace(student, masks=masks_of(student))
        require_inputs_of(context.base, student, self.kind)
        for place, teacher in enumerate(teachers, start=2):
            if teacher.spec != student.spec:
                raise PassFailed(f"parent {place} takes or gives other tensors than the student, the first parent")
        committee = Committee([teacher.module for teacher in teachers], student.spec)
        terms = TeacherTerms("auto", self.temperature, self.alpha, self.pseudo_labels)
        objective = MatchTeacher(student, context.base, terms, committee)
        callbacks = recovery_callbacks(student, self, context)
        outcome = train(student.module, objective, context.base.data("train"), self, callbacks, context)
        return Applied(student, {}, {"first_loss": outcome.first_loss, "last_loss": outcome.last_loss})
