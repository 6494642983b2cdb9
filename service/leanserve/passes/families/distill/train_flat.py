"""Trains on towards where the loss is flat, so that rounding the weights afterwards costs less.

`sam` goes down where the worst neighbour of the weights goes down (Foret et al. 2021), at two backward passes a step;
`swa` ends in the mean of the weights of many epochs (Izmailov et al. 2018), `ema` in their moving average. It trains
towards the base's answers, or with `alpha` towards labels, and says how flat it was before and after. Place it before
quantization. It costs a training; on a model that is flat already it brings nothing: look at the facts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from leanserve.contracts import BuildContext, Model
from leanserve.passes.base import Applied, Need, Pass, Stage, Tag
from leanserve.passes.toolkit.training import train
from leanserve.passes.toolkit.training_options import LabelledTrainingOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leanserve.contracts import TorchModel
    from leanserve.passes.toolkit.training_run import TrainingCallback


class TrainFlat(LabelledTrainingOptions, Pass):
    """Training with an eye on the neighbourhood of the weights."""

    kind: Literal["train_flat"] = "train_flat"
    method: Literal["sam", "swa", "ema"] = "sam"
    rho: PositiveFloat | None = None
    """Of `sam`: how far away the worst neighbour is looked for; 0.05 by default."""
    start: float | None = Field(default=None, ge=0, lt=1)
    """Of `swa`: the share of the training after which the mean begins; 0.5 by default."""
    samples: PositiveInt = 256
    """Calibration rows to measure the flatness on, and to re-estimate batch norm after `swa`."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.TRAINING
    isa_bound: ClassVar[bool] = True  # `precision: auto` trains differently where the CPU has bfloat16

    @model_validator(mode="after")
    def _options_of_the_method(self) -> Self:
        for option, method in (("rho", "sam"), ("start", "swa")):
            if getattr(self, option) is not None and self.method != method:
                raise ValueError(f"{option} is an option of {method}; drop it with method: {self.method}")
        if self.method == "ema" and not self.ema:
            raise ValueError("method: ema needs a decay; set ema, for example to 0.99")
        if self.method == "swa" and (self.ema or self.patience is not None):
            raise ValueError("swa ends in a mean of epochs, not in a moving average or the best epoch; drop the option")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | {"calibration"}

    def apply(self, model: Model, context: BuildContext) -> Applied:
        from leanserve.passes.toolkit.activations import refit_batch_norm
        from leanserve.passes.toolkit.flatness import rise_under_noise
        from leanserve.passes.toolkit.masks import masks_of
        from leanserve.passes.toolkit.structure import copy_of
        from leanserve.passes.toolkit.teacher import MatchTeacher, TeacherTerms, require_inputs_of

        made = copy_of(model, self.kind)
        made = replace(made, masks=masks_of(made))
        self.require_classes(made.spec, self.kind)
        require_inputs_of(context.base, made, self.kind)
        data = context.base.data("calibration", self.samples, made.spec)
        before = rise_under_noise(made, context.base, data, context.seed)
        objective = MatchTeacher(made, context.base, TeacherTerms(alpha=self.alpha))
        train(made.module, objective, context.base.data("train"), self, self._callbacks(made, context), context)
        if self.method == "swa":
            refit_batch_norm(made, [name for name, _ in made.module.named_modules() if name], data)
        after = rise_under_noise(made, context.base, data, context.seed)
        return Applied(made, {}, {"rise_under_noise_before": before, "rise_under_noise_after": after})

    def _callbacks(self, model: TorchModel, context: BuildContext) -> Sequence[TrainingCallback]:
        from leanserve.passes.toolkit.callbacks import usual_callbacks
        from leanserve.passes.toolkit.flatness import Sharpness, WeightAverage

        usual = usual_callbacks(model, self, context)
        if self.method == "sam":
            return [*usual, Sharpness(self.rho or 0.05)]
        return [*usual, WeightAverage(0.5 if self.start is None else self.start)] if self.method == "swa" else usual
