"""Makes layers sparse in one go, by what calibration rows say of their inputs: no training, no labels.

`wanda` (Sun et al. 2024) takes out weights that are small and meet small inputs; `sparsegpt` (Frantar and Alistarh
2023) also corrects those that stay, so that a layer's outputs on the calibration rows change least. Either takes a
share of the weights of every layer, or a pattern such as 2:4: two of every four neighbours stay, which GPUs can use.

It buys size on disk and, on the CPUs and in the runtimes here, no time (`simulated`). It costs what a share of half
costs: little with `sparsegpt`; beyond that training must follow, which keeps the pattern.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from leanserve.contracts import BuildContext, Model
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied, Need, Pass, Stage, Tag
from leanserve.passes.toolkit.targets import Targets

if TYPE_CHECKING:
    from torch import Tensor, nn

    from leanserve.contracts import TorchModel
    from leanserve.passes.toolkit.activations import Moments
    from leanserve.passes.toolkit.reconstruction import Sparsity


class PruneOneshot(Pass):
    """Sparsity of linear layers and convolutions from calibration data."""

    kind: Literal["prune_oneshot"] = "prune_oneshot"
    method: Literal["wanda", "sparsegpt"] = "sparsegpt"
    sparsity: float | None = Field(default=None, gt=0, lt=1)
    """Share of every layer's weights that becomes zero; 0.5 without a pattern."""
    pattern: str | None = Field(default=None, pattern=r"^[1-9]\d*:[1-9]\d*$")
    """`n:m`: of every m neighbouring weights of an output n stay."""
    samples: int = Field(default=128, ge=2)
    """Calibration rows to watch the layers' inputs on, and to re-estimate batch norm."""
    targets: Targets = Targets()

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.SPARSIFICATION
    simulated: ClassVar[bool] = True

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        if self.pattern is None:
            return self
        if self.sparsity is not None:
            raise ValueError("give one of sparsity and pattern: a pattern says how much stays")
        keep, group = map(int, self.pattern.split(":"))
        if keep >= group:
            raise ValueError(f"pattern {self.pattern} would keep everything; the first number is what stays")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"})

    def apply(self, model: Model, context: BuildContext) -> Applied:
        from leanserve.passes.toolkit.norm_statistics import settle_batch_norm
        from leanserve.passes.toolkit.sparsity import sparsity_of
        from leanserve.passes.toolkit.structure import copy_of

        made = copy_of(model, self.kind)
        layers, left = self._layers(made)
        masks = {}
        for name, moments in self._moments(made, layers, context).items():
            earlier = made.masks.get(f"{name}.weight")
            masks[f"{name}.weight"] = self._prune(layers[name].weight, moments.gram, earlier)
        settle_batch_norm(made, list(layers), context.base.data("calibration", self.samples, made.spec), context.base)
        facts = {"sparsity": sparsity_of(masks), "layers": len(layers)}
        return Applied(replace(made, masks={**made.masks, **masks}), {"left": left}, facts)

    @property
    def _amount(self) -> Sparsity:
        from leanserve.passes.toolkit.reconstruction import Sparsity

        if self.pattern is None:
            return Sparsity(0.5 if self.sparsity is None else self.sparsity)
        keep, group = map(int, self.pattern.split(":"))
        return Sparsity(1 - keep / group, keep, group)

    def _layers(self, model: TorchModel) -> tuple[dict[str, nn.Linear | nn.Conv2d], dict[str, str]]:
        """The layers that are looked into, and why others are left as they are."""
        from torch import nn

        from leanserve.passes.toolkit.layer_calls import trace_calls

        chosen = self.targets.select(model.module, nn.Linear, nn.Conv2d)
        layers = {name: layer for name, layer in chosen.items() if isinstance(layer, nn.Linear | nn.Conv2d)}
        calls = trace_calls(model, layers)
        tables = {id(child.weight) for child in model.module.modules() if isinstance(child, nn.Embedding)}
        left = {}
        for name, layer in layers.items():
            if not calls[name]:
                left[name] = "it is not called: it is not used, or another module reads its weight"
            elif isinstance(layer, nn.Conv2d) and layer.groups != 1:
                left[name] = "grouped convolution"
            elif id(layer.weight) in tables:
                left[name] = "it shares its weight with an embedding table"
        if len(left) == len(layers):
            raise PassFailed(f"targets: no layer can be pruned ({'; '.join(map(': '.join, left.items()))})")
        return {name: layer for name, layer in layers.items() if name not in left}, left

    def _moments(
        self, model: TorchModel, layers: dict[str, nn.Linear | nn.Conv2d], context: BuildContext
    ) -> dict[str, Moments]:
        """Second moments of what every layer multiplies its weights with."""
        from torch import nn

        from leanserve.passes.toolkit.activations import Moments, observe
        from leanserve.passes.toolkit.conv_splits import patches

        found = {name: Moments() for name in layers}

        def see(name: str, x: Tensor, _: Tensor) -> None:
            layer = layers[name]
            found[name].add(patches(x, layer) if isinstance(layer, nn.Conv2d) else x.flatten(0, -2))

        observe(model, layers, context.base.data("calibration", self.samples, model.spec), see, context.progress)
        return found

    def _prune(self, weight: Tensor, gram: Tensor, earlier: Tensor | None) -> Tensor:
        """Change a weight in place; its mask, within that of an earlier pass."""
        import torch

        from leanserve.passes.toolkit.reconstruction import sparse_gpt, wanda

        flat = weight.detach().flatten(1)
        allowed = torch.ones_like(flat, dtype=torch.bool) if earlier is None else earlier.flatten(1)
        if self.method == "wanda":
            corrected, mask = flat, allowed & wanda(flat.masked_fill(~allowed, 0), gram, self._amount)
        else:
            corrected, mask = sparse_gpt(flat, gram, self._amount, allowed)
        with torch.no_grad():
            weight.copy_((corrected * mask).reshape(weight.shape))
        return mask.reshape(weight.shape)
