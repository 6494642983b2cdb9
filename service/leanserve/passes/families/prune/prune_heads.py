"""Removes heads of attention and neurons of feed-forward layers, those that add least to what follows them.

What a head or a neuron adds is seen on calibration rows, without labels or gradients: the part of the next layer's
output that varies with it; the mean of the rest moves into a bias (after Michel et al., "Are Sixteen Heads Really
Better than One?", 2019). Attention is found in modules of transformers, of timm and your own: query, key and value
apart or fused.

It buys latency nearly in proportion to the features that go, and costs accuracy until `distill` has recovered it.
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
    from torch import Tensor, nn

    from leanserve.contracts import TorchModel
    from leanserve.passes.toolkit.narrow import Units


class PruneHeads(Pass):
    """Structural pruning of transformer layers."""

    kind: Literal["prune_heads"] = "prune_heads"
    heads: float | None = Field(default=None, gt=0, lt=1)
    """Share of all heads to remove; they compete across layers, and every layer keeps one."""
    feed_forward: float | None = Field(default=None, gt=0, lt=1)
    """Share of the neurons of every feed-forward layer to remove."""
    round_to: int = Field(default=16, ge=1)
    """Neurons that stay are a multiple of it."""
    samples: int = Field(default=128, ge=2)
    """Calibration rows on which it is seen what heads and neurons add."""
    targets: Targets = Targets()
    """Linear layers whose outputs may be thinned: those of query, key and value, and the first of a feed-forward
    part."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.STRUCTURAL_REMOVAL

    @model_validator(mode="after")
    def _something_goes(self) -> Self:
        if self.heads is None and self.feed_forward is None:
            raise ValueError("give heads, feed_forward or both: shares to remove")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"})

    def apply(self, model: Model, context: BuildContext) -> Applied:
        from leanserve.passes.toolkit.narrow import energies, narrow
        from leanserve.passes.toolkit.structure import copy_of, differences
        from leanserve.runtime.formats.torch_size import count_macs, count_parameters

        base, made = copy_of(model, self.kind), copy_of(model, self.kind)
        units = self._units(base)
        seen = energies(base, units, context.base.data("calibration", self.samples, base.spec))
        added = {reader: shares for reader, (shares, _) in seen.items()}
        kept = self._heads_kept(units, added) | self._neurons_kept(units, added)
        for item in units:
            narrow(made.module, item, kept[item.reader], seen[item.reader][1])
        gone = {item.reader: item.count - len(kept[item.reader]) for item in units}
        return Applied(
            made,
            {"layers": differences(base.module, made.module), "removed": gone},
            {
                "macs_ratio": count_macs(made) / count_macs(base),
                "parameters_ratio": count_parameters(made) / count_parameters(base),
            },
        )

    def rebuild_structure(self, module: nn.Module, decisions: Mapping[str, Json]) -> nn.Module:
        from leanserve.passes.toolkit.structure import reshape

        return reshape(module, decisions["layers"])

    def _units(self, model: TorchModel) -> list[Units]:
        """What may go by the options and the targets."""
        from torch import nn

        from leanserve.passes.toolkit.narrow import units_of

        allowed = self.targets.select(model.module, nn.Linear)
        found = [item for item in units_of(model) if set(item.makers) <= allowed.keys()]
        for what in ("heads", "feed_forward"):
            if getattr(self, what) is not None and not any(item.what == what for item in found):
                raise PassFailed(
                    f"{what}: none are found among the targets. Heads are known by linear layers query/key/value, "
                    "q_proj/k_proj/v_proj or qkv in a module with num_heads, and a feed-forward part by two linear "
                    "layers, wide and back; drop the option, or take prune_channels"
                )
        return [item for item in found if getattr(self, item.what) is not None]

    def _heads_kept(self, units: list[Units], added: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """By reader: all heads but the weakest of the model, one of every layer in any case."""
        layers = [item for item in units if item.what == "heads"]
        spared = {item.reader: int(added[item.reader].argmax()) for item in layers}
        ranked = sorted(
            (float(added[item.reader][head]) * item.count, item.reader, head)
            for item in layers
            for head in range(item.count)
            if head != spared[item.reader]
        )
        going = ranked[: round((self.heads or 0) * sum(item.count for item in layers))]
        gone = {(reader, head) for _, reader, head in going}
        return {i.reader: [head for head in range(i.count) if (i.reader, head) not in gone] for i in layers}

    def _neurons_kept(self, units: list[Units], added: Mapping[str, Tensor]) -> dict[str, list[int]]:
        kept = {}
        for item in (item for item in units if item.what == "feed_forward"):
            wanted = (1 - (self.feed_forward or 0)) * item.count
            number = min(item.count, max(1, round(wanted / self.round_to)) * self.round_to)
            kept[item.reader] = sorted(added[item.reader].topk(number).indices.tolist())
        return kept
