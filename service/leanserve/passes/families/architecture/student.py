"""A smaller model of the same kind, to be taught by the base: fewer blocks, thinner layers.

Blocks are kept at even distances, the first and the last of every stack among them, and with the base's weights (Sanh
et al., "DistilBERT", 2019); of thinner layers the channels with the largest weights stay. `init: random` begins from
nothing instead, to see what the base's weights are worth.

It buys time in proportion to blocks and width. Its answers are worth nothing until `distill` has trained it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from leanserve.contracts import BuildContext, Json, Model
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied, Need, Pass, Stage, Tag
from leanserve.passes.toolkit.targets import Targets

if TYPE_CHECKING:
    from torch import nn

    from leanserve.contracts import TorchModel


class Student(Pass):
    """Choice of blocks and width, and of the weights to begin with."""

    kind: Literal["student"] = "student"
    blocks: float | None = Field(default=None, gt=0, le=1)
    """Share of the blocks of every stack that is kept, at least one of each."""
    width: float | None = Field(default=None, gt=0, lt=1)
    """Share of the channels of every hidden layer that is kept; heads of attention are no channels, and stay."""
    init: Literal["teacher", "random"] = "teacher"
    """What the weights are at first."""
    round_to: int = Field(default=16, ge=1)
    """Channel counts stay multiples of it."""
    samples: int = Field(default=256, ge=2)
    """Calibration rows to re-estimate batch norm on."""
    targets: Targets = Targets()
    """Blocks that may go."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.ARCHITECTURE
    libraries: ClassVar[tuple[str, ...]] = ("torch", "torch-pruning")

    @model_validator(mode="after")
    def _differs(self) -> Self:
        if self.blocks is None and self.width is None and self.init == "teacher":
            raise ValueError("a student with all of its teacher is its teacher; give blocks, width or init: random")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"})

    def apply(self, model: Model, context: BuildContext) -> Applied:
        from leanserve.passes.toolkit.activations import refit_batch_norm
        from leanserve.passes.toolkit.beginnings import begin_anew
        from leanserve.passes.toolkit.stacks import skip
        from leanserve.passes.toolkit.structure import copy_of, differences
        from leanserve.runtime.formats.torch_size import count_macs, count_parameters

        made = copy_of(model, self.kind)
        macs, parameters = count_macs(made), count_parameters(made)
        skipped = {} if self.blocks is None else self._superfluous(made, self.blocks)
        skip(made.module, skipped)
        whole = made
        made = made if self.width is None else self._thinner(made, self.width)
        changed = differences(whole.module, made.module)
        if self.init == "random":
            begin_anew(made.module, context.seed)
        else:
            data = context.base.data("calibration", self.samples, made.spec)
            refit_batch_norm(made, [*skipped, *changed], data)
        facts = {"macs_ratio": count_macs(made) / macs, "parameters_ratio": count_parameters(made) / parameters}
        return Applied(made, {"skipped": skipped, "layers": changed}, facts)

    def rebuild_structure(self, module: nn.Module, decisions: Mapping[str, Json]) -> nn.Module:
        from leanserve.passes.toolkit.stacks import skip
        from leanserve.passes.toolkit.structure import reshape

        return reshape(skip(module, decisions["skipped"]), decisions["layers"])

    def _superfluous(self, model: TorchModel, share: float) -> dict[str, int]:
        """By name, the blocks that are left out, and the items that each gives."""
        from leanserve.passes.toolkit.stacks import blocks_of

        blocks = blocks_of(model, self.targets)
        gone: dict[str, int] = {}
        for stack in dict.fromkeys(block.stack for block in blocks):
            members = [block for block in blocks if block.stack == stack]
            kept = _evenly(len(members), max(1, round(share * len(members))))
            gone |= {block.name: block.items for place, block in enumerate(members) if place not in kept}
        if not gone and share < 1:
            raise PassFailed(f"blocks: {share} of the blocks is all of them; lower it, or drop the option")
        return gone

    def _thinner(self, model: TorchModel, share: float) -> TorchModel:
        from leanserve.passes.toolkit.channels import channel_groups, nearest, width
        from leanserve.passes.toolkit.importance import importance_of
        from leanserve.passes.toolkit.narrow import units_of

        # Heads are no channels: what makes them keeps its outputs, and prune_heads takes whole ones.
        attention = [name for item in units_of(model) if item.what == "heads" for name in item.makers]
        frozen = [model.module.get_submodule(name) for name in attention]
        groups = channel_groups(model, importance_of("l2", model, None), frozen)
        blocks = [block for group in groups for block in group.blocks(self.round_to, len(group.scores), "uniform")]
        if not blocks:
            raise PassFailed(f"round_to: no hidden layer has more than {self.round_to} channels; lower it")
        roots = [group.root for group in groups]
        total = width(model, roots)
        ordered = sorted(blocks, key=lambda block: block.priority)
        return nearest(model, ordered, lambda made: width(made, roots) / total, share)


def _evenly(count: int, kept: int) -> set[int]:
    """`kept` places of `count`, as far apart as can be, with the ends."""
    if kept == 1:
        return {0}
    return {round(place * (count - 1) / (kept - 1)) for place in range(kept)}
