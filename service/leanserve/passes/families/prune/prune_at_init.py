"""Decides which weights a network does without before it is trained, and hands on the untrained, sparse network.

`snip` (Lee et al. 2019) and `grasp` (Wang et al. 2020) look at gradients on labelled rows, `synflow` (Tanaka et al.
2020) at paths through the network alone. It saves the training of a dense network where there is none yet. Here there
always is one, the base, from which `prune_magnitude` makes a better sparse network: take this to compare.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from leanserve.contracts import BuildContext, Model
from leanserve.passes.base import Applied, Need, Pass, Stage, Tag
from leanserve.passes.toolkit.targets import Targets

if TYPE_CHECKING:
    from torch import Tensor

    from leanserve.contracts import TorchModel


class PruneAtInit(Pass):
    """Sparsity of an untrained network."""

    kind: Literal["prune_at_init"] = "prune_at_init"
    sparsity: float = Field(gt=0, lt=1)
    """Share of the targeted weights that become zero."""
    method: Literal["snip", "grasp", "synflow"] = "synflow"
    init: Literal["random", "given"] = "random"
    """`random`: the weights are made anew; `given`: those that the model has."""
    samples: int = Field(default=256, ge=1)
    """Labelled rows of the train split for `snip` and `grasp`."""
    targets: Targets = Targets()
    """Modules whose matrices and kernels may lose weights; embedding tables never do."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.SPARSIFICATION
    simulated: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset() if self.method == "synflow" else frozenset({"train", "labels"})

    def apply(self, model: Model, context: BuildContext) -> Applied:
        from leanserve.passes.toolkit.beginnings import begin_anew
        from leanserve.passes.toolkit.sparsity import apply_masks, sparse_weights, sparsity_of
        from leanserve.passes.toolkit.structure import copy_of

        made = copy_of(model, self.kind)
        if self.init == "random":
            begin_anew(made.module, context.seed)
        masks = self._masks(made, list(sparse_weights(made, self.targets)), context)
        masks = {name: mask & made.masks[name] if name in made.masks else mask for name, mask in masks.items()}
        apply_masks(made.module, masks)
        return Applied(replace(made, masks={**made.masks, **masks}), {}, {"sparsity": sparsity_of(masks)})

    def _masks(self, model: TorchModel, names: list[str], context: BuildContext) -> dict[str, Tensor]:
        from leanserve.passes.toolkit.initial_scores import grasp, snip, synflow_masks
        from leanserve.passes.toolkit.sparsity import masks_by_score

        if self.method == "synflow":
            return synflow_masks(model, names, self.sparsity)
        data = context.base.data("train", self.samples, model.spec)
        score = snip if self.method == "snip" else grasp
        return masks_by_score(score(model, names, data), self.sparsity, "global")
