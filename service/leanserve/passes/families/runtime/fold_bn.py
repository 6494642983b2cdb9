"""Fold batch norm into the layer before it: at inference both are affine, so one layer computes the same function.

The arithmetic is Jacob et al. 2018, section 3.2. It saves a pass over every feature map and its parameters, changes no
answer beyond float rounding, and costs nothing but the possibility to re-estimate the statistics: so it comes after
pruning and training. Which layers belong together is read from the exported graph, never guessed from names or from the
order of declaration: a layer whose output, or whose weight or bias, is also used elsewhere is left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from leanserve.comparison import largest_difference, largest_finite
from leanserve.contracts import BuildContext, Json, Model
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied, Pass, Stage, Tag
from leanserve.passes.toolkit.exported_calls import operator_of, owner_of
from leanserve.runtime.formats.expected import torch_model

if TYPE_CHECKING:
    import torch
    from torch import fx, nn

LAYERS = frozenset(["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"])
TOLERANCE = 1e-4
"""Largest accepted change of an output, relative to the largest output: rounding through many layers."""


class FoldBn(Pass):
    """Fold every batch norm that follows a convolution, transposed convolution or linear layer."""

    kind: Literal["fold_bn"] = "fold_bn"

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.NUMERIC_PREPARATION

    def apply(self, model: Model, context: BuildContext) -> Applied:
        import torch

        model = torch_model(model, self.kind)
        module = copy.deepcopy(model.module).eval()
        rows = model.spec.most_rows(2)
        example = tuple(torch.from_numpy(array) for array in model.spec.example(rows, seed=context.seed))
        pairs = _pairs(module, example)
        if not pairs:
            raise PassFailed("fold_bn: no batch norm follows a convolution or linear layer; drop the pass")
        with torch.no_grad():
            before = module(*example)
            folded = [_folded(module.get_submodule(layer), module.get_submodule(norm)) for layer, norm in pairs]
            self._join(module, pairs)
            for (layer, _), (weight, bias) in zip(pairs, folded, strict=True):
                module.get_parameter(f"{layer}.weight").copy_(weight)
                module.get_parameter(f"{layer}.bias").copy_(bias)
            change = _relative_change(module(*example), before)
        if change > TOLERANCE:
            raise PassFailed(f"fold_bn changed the outputs by {change:.1e} of their size; this model cannot be folded")
        return Applied(
            replace(model, module=module), {"pairs": pairs}, {"folded": len(pairs), "relative_change": change}
        )

    def rebuild_structure(self, module: nn.Module, decisions: Mapping[str, Json]) -> nn.Module:
        self._join(module, decisions["pairs"])
        return module

    @staticmethod
    def _join(module: nn.Module, pairs: Sequence[Sequence[str]]) -> None:
        """Give every layer a bias and put an identity where its batch norm was."""
        import torch
        from torch import nn

        for layer_name, norm_name in pairs:
            layer: Any = module.get_submodule(layer_name)
            if layer.bias is None:
                features = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
                layer.bias = nn.Parameter(torch.zeros(features))
            module.set_submodule(norm_name, nn.Identity())


def _pairs(module: nn.Module, example: tuple[torch.Tensor, ...]) -> list[list[str]]:
    """Names of the layers and of the batch norms that can be folded into them, in the order in which they run."""
    import torch

    program = torch.export.export(module, example)
    names = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    pairs = []
    for norm in program.graph.nodes:
        if operator_of(norm) != "batch_norm":
            continue
        layer, statistics = norm.args[0], norm.args[3]
        if statistics is None or len(statistics.users) != 1 or not _foldable(layer, names):
            continue
        pairs.append([owner_of(names[layer.args[1].name]), owner_of(names[statistics.name])])
    return pairs


def _foldable(layer: fx.Node, names: Mapping[str, str]) -> bool:
    """Whether the batch norm is all that reads this layer's output, and this call all that reads its tensors."""
    if operator_of(layer) not in LAYERS or len(layer.users) != 1:
        return False
    if operator_of(layer) == "linear" and layer.meta["val"].ndim != 2:
        return False  # batch norm then normalises positions, not features
    weight, *rest = layer.args[1:3]
    tensors = [tensor for tensor in (weight, *rest) if isinstance(tensor, type(layer))]
    return weight in tensors and all(tensor.name in names and len(tensor.users) == 1 for tensor in tensors)


def _folded(layer: Any, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the one layer that computes both; in float64, so that rounding happens once."""
    import torch

    weight, variance, mean = layer.weight.double(), norm.running_var.double(), norm.running_mean.double()
    scale = (variance + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight.double())
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.double()
    bias = (bias - mean) * scale + (0.0 if norm.bias is None else norm.bias.double())
    if not getattr(layer, "transposed", False):
        return weight * scale.view(-1, *[1] * (weight.ndim - 1)), bias
    # A transposed kernel is (in, out / groups, ...): the channels of group g are scaled in its share of the rows.
    grouped = weight.view(layer.groups, -1, *weight.shape[1:])
    return (grouped * scale.view(layer.groups, 1, -1, *[1] * (weight.ndim - 2))).view_as(weight), bias


def _relative_change(
    now: torch.Tensor | tuple[torch.Tensor, ...], before: torch.Tensor | tuple[torch.Tensor, ...]
) -> float:
    pairs = zip(*(item if isinstance(item, tuple) else (item,) for item in (now, before)), strict=True)
    arrays = ((one.numpy(), other.numpy()) for one, other in pairs)
    return max(largest_difference(one, other) / max(largest_finite(other), 1e-12) for one, other in arrays)
