"""Writes a linear layer as two thin ones: `W x ~ A (B x)` with `r` directions between them.

`svd` truncates the weight itself. `asvd` first scales each input by its mean magnitude to the power 1/2 (Yuan et al.,
"ASVD: Activation-aware Singular Value Decomposition", 2023). `svd_llm` whitens the inputs by the Cholesky factor of
their second moments, so that what is dropped is exactly the output energy lost (Wang et al., "SVD-LLM", 2024).

It buys r (in + out) instead of in * out multiply-accumulates, and costs accuracy that training can recover; layers that
would not get cheaper are left alone. Most trained layers have slowly falling spectra: measure before you believe.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator

from leanserve.contracts import BuildContext, Data, Json, Model, TorchModel
from leanserve.passes.base import Applied, Need, Pass, Stage, Tag
from leanserve.passes.toolkit.rank_ladders import Losses, Ranks
from leanserve.passes.toolkit.ranks import Candidate, RankRule
from leanserve.passes.toolkit.targets import Targets

if TYPE_CHECKING:
    from torch import Tensor, nn

    from leanserve.passes.toolkit.factors import Basis
    from leanserve.passes.toolkit.layer_calls import Call


class LowrankLinear(RankRule, Pass):
    """Low-rank factorisation of linear layers."""

    kind: Literal["lowrank_linear"] = "lowrank_linear"
    method: Literal["svd", "asvd", "svd_llm"] = "svd_llm"
    """What the truncation minimises: the weight's error, or the output's error on calibration data."""
    asymmetric: bool = False
    """With `svd_llm`: the second layer of each pair is fitted to the output, by what the layers before it give now."""
    samples: int = Field(default=256, ge=2)
    """Calibration rows for `asvd` and `svd_llm`, and to re-estimate batch norm."""
    targets: Targets = Targets()

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.FACTORISATION

    @model_validator(mode="after")
    def _vbmf_is_of_weights(self) -> Self:
        if self.vbmf and self.method != "svd":
            raise ValueError("vbmf tells noise in weights from the rest; set method: svd, or take energy")
        return self

    @model_validator(mode="after")
    def _asymmetric_is_of_outputs(self) -> Self:
        if self.asymmetric and self.method != "svd_llm":
            raise ValueError("asymmetric fits layers to outputs, as svd_llm does; set that, or drop it")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"})

    def apply(self, model: Model, context: BuildContext) -> Applied:
        from leanserve.passes.toolkit.layer_calls import execution_order
        from leanserve.passes.toolkit.layer_losses import losses_by_layer
        from leanserve.passes.toolkit.layer_times import ratio_of, seconds_of_row
        from leanserve.passes.toolkit.norm_statistics import settle_batch_norm
        from leanserve.passes.toolkit.structure import copy_of, replace
        from leanserve.passes.toolkit.timing import inference
        from leanserve.runtime.formats.torch_size import count_macs, count_parameters

        made = copy_of(model, self.kind)
        macs, parameters = count_macs(made), count_parameters(made)
        layers, left = self._layers(made)
        bases = self._bases(made, layers, context)
        losses = {}
        if self.sensitivity == "answers":
            instead = partial(_pairs, layers, bases)
            losses = losses_by_layer(made, layers, instead, self.samples, context)
        with inference(context.threads):
            total = macs if self.latency is None else seconds_of_row(made)
            choice = self.choose(_candidates(made, layers, bases, losses), total, left)
        whole = TorchModel(copy.deepcopy(made.module), made.spec)
        rows = context.base.data("calibration", self.samples, made.spec)
        for name in execution_order(made, {name: layers[name] for name in choice.ranks}):
            pair = _factorised(layers[name], bases[name], choice.ranks[name][0])
            replace(made.module, layers[name], pair)
            if self.asymmetric:
                _fit(pair, name, made, whole, rows)
        settle_batch_norm(made, choice.ranks, rows, context.base)
        with inference(context.threads):
            reached = {"latency_ratio": ratio_of(made, whole)} if self.times else {}
        return Applied(
            made,
            {"ranks": {name: rank for name, (rank,) in choice.ranks.items()}, "left": choice.left},
            {
                "macs_ratio": count_macs(made) / macs,
                "parameters_ratio": count_parameters(made) / parameters,
                "layers": len(choice.ranks),
                **reached,
            },
        )

    def rebuild_structure(self, module: nn.Module, decisions: Mapping[str, Json]) -> nn.Module:
        from torch import nn

        from leanserve.passes.toolkit.structure import replace

        for name, rank in decisions["ranks"].items():
            layer = cast("nn.Linear", module.get_submodule(name))
            replace(module, layer, nn.Sequential(*_thin(layer, rank)).eval())
        return module

    def _layers(self, model: TorchModel) -> tuple[dict[str, nn.Linear], dict[str, str]]:
        """The linear layers that can be split, and why the others cannot be."""
        from torch import nn

        from leanserve.passes.toolkit.layer_calls import trace_calls

        layers, left = self.targets.select(model.module, nn.Linear), {}
        calls = trace_calls(model, layers)
        for name in layers:
            holder = model.module.get_submodule(name.rpartition(".")[0])
            if isinstance(holder, nn.MultiheadAttention | nn.TransformerEncoderLayer):
                left[name] = f"{type(holder).__name__} reads its weight instead of calling it"
            elif not calls[name]:
                left[name] = "it is not used"
        return {name: layer for name, layer in layers.items() if name not in left}, left

    def _bases(self, model: TorchModel, layers: Mapping[str, nn.Linear], context: BuildContext) -> dict[str, Basis]:
        from leanserve.passes.toolkit.activations import Moments, observe
        from leanserve.passes.toolkit.factors import cholesky_scale, input_basis

        weights = {name: layer.weight.detach().T for name, layer in layers.items()}
        if self.method == "svd":
            return {name: input_basis(weight) for name, weight in weights.items()}
        moments = {name: Moments() for name in layers}

        def see(name: str, x: Tensor, _: Tensor) -> None:
            flat = x.flatten(0, -2)
            moments[name].add(flat.abs() if self.method == "asvd" else flat)

        observe(model, layers, context.base.data("calibration", self.samples, model.spec), see, context.progress)
        if self.method == "asvd":
            scales = {name: seen.mean.clamp_min(1e-6).sqrt().diag() for name, seen in moments.items()}
        else:
            scales = {name: cholesky_scale(seen.gram) for name, seen in moments.items()}
        return {name: input_basis(weight, scales[name]) for name, weight in weights.items()}


def _pairs(
    layers: Mapping[str, nn.Linear], bases: Mapping[str, Basis], name: str, ranks: Sequence[Ranks], _: Data
) -> list[nn.Module]:
    return [_factorised(layers[name], bases[name], rank) for (rank,) in ranks]


def _candidates(
    model: TorchModel, layers: Mapping[str, nn.Linear], bases: Mapping[str, Basis], losses: Mapping[str, Losses]
) -> dict[str, Candidate]:
    from leanserve.passes.toolkit.layer_calls import positions, trace_calls

    calls = trace_calls(model, layers)
    places = {name: positions(found, channel_axis=-1) for name, found in calls.items()}
    return {
        name: Candidate(
            (bases[name].energies.tolist(),),
            places[name] * layer.in_features * layer.out_features,
            partial(_cost, places[name] * (layer.in_features + layer.out_features)),
            ((layer.in_features, layer.out_features),),
            cache(partial(_seconds, layer, calls[name])),
            losses.get(name),
        )
        for name, layer in layers.items()
    }


def _cost(unit: int, ranks: Ranks) -> int:
    return unit * ranks[0]


def _seconds(layer: nn.Linear, calls: Sequence[Call], ranks: Ranks) -> float:
    """Measured time of a row, of the layer or of what takes its place."""
    from torch import nn

    from leanserve.passes.toolkit.layer_times import seconds_of

    return seconds_of(nn.Sequential(*_thin(layer, *ranks)) if ranks else layer, calls, layer.in_features)


def _fit(pair: nn.Sequential, name: str, made: TorchModel, whole: TorchModel, rows: Data) -> None:
    """Make the second layer of a pair the least-squares answer to what the whole model's layer gives."""
    import torch

    from leanserve.passes.toolkit.activations import Moments, observe_beside
    from leanserve.passes.toolkit.factors import regress

    seen, second = Moments(), cast("nn.Linear", pair[1])

    def see(_: str, x: Tensor, y: Tensor) -> None:
        seen.add(torch.cat([pair[0](x).flatten(0, -2), y.flatten(0, -2)], dim=1))

    observe_beside(made, whole, name, rows, see)
    features = second.in_features
    centred = second.bias is not None
    solution = regress(seen.covariance if centred else seen.gram, features)
    with torch.no_grad():
        second.weight.copy_(solution.T)
        if centred:
            second.bias.copy_(seen.mean[features:] - seen.mean[:features] @ solution)


def _thin(layer: nn.Linear, rank: int) -> tuple[nn.Linear, nn.Linear]:
    """The two layers that take the place of `layer`, without their weights."""
    from torch import nn

    first = nn.Linear(layer.in_features, rank, bias=False)
    return first, nn.Linear(rank, layer.out_features, bias=layer.bias is not None)


def _factorised(layer: nn.Linear, basis: Basis, rank: int) -> nn.Sequential:
    import torch

    first, second = _thin(layer, rank)
    with torch.no_grad():
        first.weight.copy_(basis.encode[:, :rank].T)
        second.weight.copy_((basis.decode[:rank] @ layer.weight.T.double()).T)
        if layer.bias is not None:
            second.bias.copy_(layer.bias)
    return torch.nn.Sequential(first, second).eval()
