"""Sets the smallest weights to zero (Han et al., "Learning both Weights and Connections", 2015).

All at once, or more and more along a cubic while the model trains towards the base's answers (Zhu and Gupta, "To Prune,
or Not to Prune", 2017). What is left out stays zero in any later training, and is not stored.

It buys size on disk in proportion and no time: dense kernels multiply zeros as well as anything (`simulated`). It costs
little up to half of the weights without any training, up to nine tenths with it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from leanserve.contracts import BuildContext, Model
from leanserve.passes.base import Applied, Need, Pass, Stage, Tag
from leanserve.passes.toolkit.targets import Targets
from leanserve.passes.toolkit.training import train
from leanserve.passes.toolkit.training_options import TrainingOptions

if TYPE_CHECKING:
    from torch import Tensor

    from leanserve.contracts import TorchModel


class PruneMagnitude(Pass):
    """Unstructured sparsity by the size of weights."""

    kind: Literal["prune_magnitude"] = "prune_magnitude"
    sparsity: float = Field(gt=0, lt=1)
    """Share of the targeted weights that become zero."""
    scope: Literal["local", "global", "erk"] = "global"
    """`local`: the same share of every layer; `global`: weights compete across layers; `erk`: by the layers' shapes."""
    recovery: TrainingOptions | None = None
    """Train towards the base's answers while the sparsity grows, and after that."""
    ramp: float | None = Field(default=None, gt=0, le=1)
    """Share of the training in which the sparsity grows; 0.5 by default."""
    samples: int = Field(default=256, ge=2)
    """Without recovery: calibration rows to re-estimate batch norm."""
    targets: Targets = Targets()
    """Modules whose matrices and kernels may lose weights; embedding tables never do."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.SPARSIFICATION
    simulated: ClassVar[bool] = True
    isa_bound: ClassVar[bool] = True  # `precision: auto` trains differently where the CPU has bfloat16

    @model_validator(mode="after")
    def _ramp_is_of_training(self) -> Self:
        if self.recovery is None and self.ramp is not None:
            raise ValueError("ramp is a share of the training, and there is none; set recovery, or drop ramp")
        if self.recovery is not None and self.recovery.patience is not None:
            raise ValueError("recovery.patience could end the training before its sparsity is reached; drop it")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"}) if self.recovery is None else self.recovery.training_needs

    @property
    def processes_needed(self) -> int:
        return 1 if self.recovery is None else self.recovery.processes

    def apply(self, model: Model, context: BuildContext) -> Applied:
        from leanserve.passes.toolkit.sparsity import sparse_weights, sparsity_of
        from leanserve.passes.toolkit.structure import copy_of

        made = copy_of(model, self.kind)
        facts: dict[str, float] = {}
        if self.recovery is None:
            masks = self._at_once(made, context)
        else:
            masks, facts = self._while_training(made, self.recovery, context)
        own = {name: masks[name] for name in sparse_weights(made, self.targets)}
        return Applied(replace(made, masks=masks), {}, {"sparsity": sparsity_of(own), **facts})

    def _choose(self, model: TorchModel, share: float = 1.0) -> dict[str, Tensor]:
        """Masks for a share of the sparsity; what was zero by a mask has no size and goes first."""
        from leanserve.passes.toolkit.sparsity import masks_by_score, sparse_weights

        sizes = {name: weight.detach().abs() for name, weight in sparse_weights(model, self.targets).items()}
        chosen = masks_by_score(sizes, self.sparsity * share, self.scope)
        earlier = model.masks
        return {
            name: mask & earlier[name].to(mask.device) if name in earlier else mask for name, mask in chosen.items()
        }

    def _at_once(self, made: TorchModel, context: BuildContext) -> dict[str, Tensor]:
        from leanserve.passes.toolkit.norm_statistics import settle_batch_norm
        from leanserve.passes.toolkit.sparsity import apply_masks, layers_of

        masks = self._choose(made)
        apply_masks(made.module, masks)
        settle_batch_norm(
            made, layers_of(masks), context.base.data("calibration", self.samples, made.spec), context.base
        )
        return {**made.masks, **masks}

    def _while_training(
        self, made: TorchModel, options: TrainingOptions, context: BuildContext
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        from leanserve.passes.toolkit.callbacks import usual_callbacks
        from leanserve.passes.toolkit.masks import masks_of
        from leanserve.passes.toolkit.sparsity import GrowingMasks
        from leanserve.passes.toolkit.teacher import MatchTeacher, TeacherTerms, require_inputs_of

        require_inputs_of(context.base, made, self.kind)
        growing = GrowingMasks(lambda share: self._choose(made, share), self.ramp or 0.5, masks_of(made))
        callbacks = [growing, *usual_callbacks(made, options, context)]
        data = context.base.data("train", spec=made.spec)
        objective = MatchTeacher(made, context.base, TeacherTerms())
        outcome = train(made.module, objective, data, options, callbacks, context)
        masks = {name: mask.cpu() for name, mask in growing.masks.items()}
        return masks, {"first_loss": outcome.first_loss, "last_loss": outcome.last_loss}
