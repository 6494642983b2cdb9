"""Takes out the weights that training moves towards zero, not those that are small (Sanh et al. 2020).

For models that are tuned to another task than they were trained for: there the large weights are those of the old one.
With a `block` whole tiles go, for example of 16 x 16, or of as many rows as a head has: heads and feed-forward neurons
that are left with nothing to say are taken out of the model, which is smaller and faster then. It trains towards the
base's answers, with `alpha` towards labels, and costs one training. On a model that only has to answer as before
`prune_magnitude` does as well.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from leanserve.contracts import BuildContext, Json, Model, TorchModel
from leanserve.passes.base import Applied, Pass, Stage, Tag
from leanserve.passes.toolkit.targets import Targets
from leanserve.passes.toolkit.training import train
from leanserve.passes.toolkit.training_options import LabelledTrainingOptions

if TYPE_CHECKING:
    from torch import nn

SEEN_ROWS = 128
"""Rows of the train split on which it is seen what idle heads and neurons say, which goes into a bias."""


class PruneMovement(LabelledTrainingOptions, Pass):
    """Sparsity that is learned while the model trains."""

    kind: Literal["prune_movement"] = "prune_movement"
    sparsity: float = Field(gt=0, lt=1)
    """Share of every layer's weights (or blocks) that becomes zero."""
    block: tuple[PositiveInt, PositiveInt] = (1, 1)
    """Outputs times inputs that go together; kernels are laid flat."""
    ramp: float = Field(default=0.7, gt=0, le=1)
    """Share of the training in which the sparsity grows."""
    targets: Targets = Targets()
    """Modules whose matrices and kernels may lose weights; embedding tables never do."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.SPARSIFICATION
    simulated: ClassVar[bool] = True
    isa_bound: ClassVar[bool] = True  # `precision: auto` trains differently where the CPU has bfloat16

    @model_validator(mode="after")
    def _ends_sparse(self) -> Self:
        if self.patience is not None or self.ema:
            raise ValueError("patience and ema end in weights of an earlier sparsity; drop them")
        return self

    def apply(self, model: Model, context: BuildContext) -> Applied:
        from leanserve.passes.toolkit.callbacks import usual_callbacks
        from leanserve.passes.toolkit.masks import masks_of
        from leanserve.passes.toolkit.movement import GrowMovement, MovementScores
        from leanserve.passes.toolkit.sparsity import apply_masks, sparse_weights, sparsity_of
        from leanserve.passes.toolkit.structure import copy_of, differences
        from leanserve.passes.toolkit.teacher import MatchTeacher, TeacherTerms, require_inputs_of
        from leanserve.runtime.formats.torch_size import count_macs

        made = copy_of(model, self.kind)
        made = replace(made, masks=masks_of(made))
        require_inputs_of(context.base, made, self.kind)
        self.require_classes(made.spec, self.kind)
        answers = MatchTeacher(made, context.base, TeacherTerms(alpha=self.alpha))
        scores = MovementScores(answers, sparse_weights(made, self.targets), self.sparsity, self.block)
        callbacks = [*usual_callbacks(made, self, context), GrowMovement(scores, self.ramp)]
        outcome = train(made.module, scores, context.base.data("train"), self, callbacks, context)
        chosen = {name: mask.cpu() for name, mask in scores.masks().items()}
        masks = {name: mask & made.masks[name] if name in made.masks else mask for name, mask in chosen.items()}
        apply_masks(made.module, masks)
        facts = {"sparsity": sparsity_of(masks), "first_loss": outcome.first_loss, "last_loss": outcome.last_loss}
        whole = made = replace(made, masks={**made.masks, **masks})
        made, removed = self._without_idle(whole, context)
        facts["macs_ratio"] = count_macs(made) / count_macs(whole)
        layers = differences(whole.module, made.module)
        return Applied(made, {"layers": layers, "removed": removed}, facts, simulated=not layers)

    def rebuild_structure(self, module: nn.Module, decisions: Mapping[str, Json]) -> nn.Module:
        from leanserve.passes.toolkit.structure import reshape

        return reshape(module, decisions["layers"])

    def _without_idle(self, model: TorchModel, context: BuildContext) -> tuple[TorchModel, dict[str, int]]:
        """The model without heads and neurons that add the same to every row, and how many went, by their reader."""
        from leanserve.passes.toolkit.narrow import energies, narrow, units_of

        made = replace(model, module=copy.deepcopy(model.module))
        units = units_of(made)
        seen = energies(made, units, context.base.data("train", SEEN_ROWS, made.spec))
        removed: dict[str, int] = {}
        for item in units:
            idle = item.idle(made.module)
            kept = [unit for unit in range(item.count) if unit not in idle] or [0]
            if len(kept) < item.count:
                narrow(made.module, item, kept, seen[item.reader][1])
                removed[item.reader] = item.count - len(kept)
        weights = dict(made.module.named_parameters())
        masks = {
            name: mask if mask.shape == weights[name].shape else weights[name].detach() != 0
            for name, mask in made.masks.items()
        }
        return replace(made, masks=masks), removed
