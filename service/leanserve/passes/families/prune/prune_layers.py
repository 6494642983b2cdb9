"""Leaves out whole blocks (transformer layers, residual blocks), those that change least.

`cosine` compares what goes into a block with what comes out (Men et al., "ShortGPT", 2024); `kl` tries the model
without it and looks at its answers. One block after another goes, and after each the others are measured anew.

It buys time in proportion to the blocks, on every machine, more than thinner layers of the same MACs do. It costs
more accuracy than anything else until `distill` has recovered it: gate only then.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from leanserve.contracts import BuildContext, Json, Model
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied, Need, Pass, Stage, Tag
from leanserve.passes.toolkit.targets import Targets

if TYPE_CHECKING:
    from torch import nn

    from leanserve.contracts import Data, TorchModel
    from leanserve.passes.toolkit.stacks import StackBlock


class PruneLayers(Pass):
    """Removal of blocks that give back the shape they take."""

    kind: Literal["prune_layers"] = "prune_layers"
    drop: PositiveInt
    """How many blocks go."""
    score: Literal["cosine", "kl"] = "cosine"
    """How it is told which: by what a block changes, or by the answers without it."""
    samples: int = Field(default=128, ge=2)
    """Calibration rows to score blocks, and to re-estimate batch norm."""
    targets: Targets = Targets()
    """Blocks that may go."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.STRUCTURAL_REMOVAL

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"})

    def apply(self, model: Model, context: BuildContext) -> Applied:
        from leanserve.passes.toolkit.activations import refit_batch_norm
        from leanserve.passes.toolkit.stacks import blocks_of, skip
        from leanserve.passes.toolkit.structure import copy_of
        from leanserve.runtime.formats.torch_size import count_macs, count_parameters

        made = copy_of(model, self.kind)
        macs, parameters = count_macs(made), count_parameters(made)
        blocks, dropped, scores = blocks_of(made, self.targets), {}, {}
        if self.drop >= len(blocks):
            raise PassFailed(f"drop: {self.drop} of {len(blocks)} blocks that can go; leave at least one")
        data = context.base.data("calibration", self.samples, made.spec)
        for step in range(self.drop):
            context.progress(step, self.drop, "leaving out blocks")
            name, score = self._least(made, blocks, data, context)
            gone = next(item for item in blocks if item.name == name)
            blocks.remove(gone)
            dropped[name], scores[name] = gone.items, score
            skip(made.module, {name: gone.items})
        refit_batch_norm(made, list(dropped), data)
        facts = {"macs_ratio": count_macs(made) / macs, "parameters_ratio": count_parameters(made) / parameters}
        return Applied(made, {"dropped": dropped, "scores": scores}, facts)

    def rebuild_structure(self, module: nn.Module, decisions: Mapping[str, Json]) -> nn.Module:
        from leanserve.passes.toolkit.stacks import skip

        return skip(module, decisions["dropped"])

    def _least(
        self, model: TorchModel, blocks: list[StackBlock], data: Data, context: BuildContext
    ) -> tuple[str, float]:
        """The block that is missed least, and its score."""
        from leanserve.passes.toolkit.stacks import changes_of

        if self.score == "cosine":
            scores = changes_of(model, blocks, data)
        else:
            scores = {block.name: self._distance_without(model, block, data, context) for block in blocks}
        return min(scores.items(), key=lambda item: item[1])

    def _distance_without(self, model: TorchModel, block: StackBlock, data: Data, context: BuildContext) -> float:
        from leanserve.passes.toolkit.activations import refit_batch_norm
        from leanserve.passes.toolkit.barrier import answer_loss
        from leanserve.passes.toolkit.stacks import skip

        without = replace(model, module=copy.deepcopy(model.module))
        skip(without.module, {block.name: block.items})
        refit_batch_norm(without, [block.name], data)
        return answer_loss(without, context.base, data)
