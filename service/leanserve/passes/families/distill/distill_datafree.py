"""Distillation without data: on inputs that are made from the base itself (Yin et al., "DeepInversion", 2020).

Noise is changed until the base's batch norms see what they remember of its training and its answers are sure. It buys
a recovery where nobody may have the data; where there are rows, even without labels, `distill` is far better.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from leanserve.contracts import BuildContext, Model
from leanserve.passes.base import Applied, Need, Pass, Stage, Tag
from leanserve.passes.toolkit.training import train
from leanserve.passes.toolkit.training_options import TrainingOptions


class DistillDatafree(TrainingOptions, Pass):
    """Train on the base's answers to inputs that were made from the base."""

    kind: Literal["distill_datafree"] = "distill_datafree"
    rows: int = Field(default=512, ge=2)
    """How many inputs are made."""
    inversion_steps: PositiveInt = 200
    """How often each is changed."""
    temperature: PositiveFloat = 4.0
    """As in `distill`."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.TRAINING
    isa_bound: ClassVar[bool] = True  # `precision: auto` trains differently where the CPU has bfloat16

    @model_validator(mode="after")
    def _without_data(self) -> Self:
        if self.patience is not None:
            raise ValueError("patience goes by the calibration split, and this pass does without data; drop it")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"batches"})

    def apply(self, model: Model, context: BuildContext) -> Applied:
        from leanserve.passes.toolkit.callbacks import usual_callbacks
        from leanserve.passes.toolkit.inversion import invent
        from leanserve.passes.toolkit.masks import masks_of
        from leanserve.passes.toolkit.structure import copy_of
        from leanserve.passes.toolkit.teacher import MatchTeacher, TeacherTerms, require_inputs_of

        student = copy_of(model, self.kind)
        student = replace(student, masks=masks_of(student))
        require_inputs_of(context.base, student, self.kind)
        data, ends = invent(context.base.torch_module(), context, self.rows, max(2, self.batch), self.inversion_steps)
        objective = MatchTeacher(student, context.base, TeacherTerms("auto", self.temperature))
        outcome = train(student.module, objective, data, self, usual_callbacks(student, self, context), context)
        facts = {"inversion_first": ends[0], "inversion_last": ends[1]}
        return Applied(student, {}, facts | {"first_loss": outcome.first_loss, "last_loss": outcome.last_loss})
