"""Writes a convolution as a chain of cheaper ones, exact at full rank, cheaper below its break-even rank.

Schemes: `spatial` (k x 1 then 1 x k; Jaderberg et al., 2014), `channel` (k x k with r outputs then 1 x 1; Zhang et al.,
2015), `tucker2` (1 x 1, k x k between few channels, 1 x 1; Kim et al., 2016), `cp` (1 x 1, k x 1 and 1 x k on each
channel alone, 1 x 1; Lebedev et al., 2015) and `depthwise` (1 x 1, k x k on each channel alone, 1 x 1; Guo et al.,
2018). `weight` keeps the directions that matter to the weight, `output` those that matter to the layer's outputs on
calibration data, and then refits the last convolution by least squares to the original outputs (the linear case of
Zhang et al., each layer on its own).

It buys MACs on layers whose channels or kernels are correlated and costs accuracy that training can recover. More and
smaller convolutions use the hardware less well: on a CPU at batch 1 a residual CNN with a third of its MACs is 1.3-1.6
times as fast in torch and 2.0-2.3 times in ONNX Runtime.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator

from leanserve.contracts import BuildContext, Data, Json, Model, TorchModel
from leanserve.passes.base import Applied, Need, Pass, Stage, Tag
from leanserve.passes.toolkit.ranks import Candidate, Choice, RankRule
from leanserve.passes.toolkit.targets import Targets

if TYPE_CHECKING:
    from torch import Tensor, nn

    from leanserve.passes.toolkit.conv_splits import ConvSplit
    from leanserve.passes.toolkit.factors import Basis
    from leanserve.passes.toolkit.rank_ladders import Losses, Ranks


class LowrankConv(RankRule, Pass):
    """Low-rank factorisation of 2-d convolutions."""

    kind: Literal["lowrank_conv"] = "lowrank_conv"
    scheme: Literal["spatial", "channel", "tucker2", "cp", "depthwise"] = "spatial"
    approximate: Literal["weight", "output"] = "output"
    """Whether the weight's error is minimised, or the output's error on calibration data."""
    asymmetric: bool = False
    """With `output`: layers are fitted one after another, each to what the layers before it give now (Zhang et al.)."""
    samples: int = Field(default=128, ge=2)
    """Calibration rows for `approximate: output`, and to re-estimate batch norm."""
    targets: Targets = Targets()

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.FACTORISATION

    @model_validator(mode="after")
    def _vbmf_is_of_weights(self) -> Self:
        if self.vbmf and self.approximate != "weight":
            raise ValueError("vbmf tells noise in weights from the rest; set approximate: weight, or take energy")
        if self.vbmf and self.scheme in ("cp", "depthwise"):
            raise ValueError(f"vbmf looks at matrices, and {self.scheme} has none; take macs or energy")
        return self

    @model_validator(mode="after")
    def _asymmetric_is_of_outputs(self) -> Self:
        if self.asymmetric and self.approximate != "output":
            raise ValueError("asymmetric fits layers to outputs; set approximate: output, or drop it")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"})

    def apply(self, model: Model, context: BuildContext) -> Applied:
        from leanserve.passes.toolkit.layer_calls import execution_order
        from leanserve.passes.toolkit.layer_times import ratio_of, seconds_of_row
        from leanserve.passes.toolkit.norm_statistics import settle_batch_norm
        from leanserve.passes.toolkit.structure import copy_of
        from leanserve.passes.toolkit.timing import inference
        from leanserve.runtime.formats.torch_size import count_macs, count_parameters

        made = copy_of(model, self.kind)
        macs, parameters = count_macs(made), count_parameters(made)
        splits, left = self._splits(made)
        bases = self._bases(made, splits, context)
        spectra = {name: tuple(basis.energies.tolist() for basis in bases[name]) for name in splits}
        losses = self._losses(made, splits, bases, context) if self.sensitivity == "answers" else {}
        candidates = {
            name: Candidate(spectra[name], split.dense, split.cost, split.sides, cache(split.seconds), losses.get(name))
            for name, split in splits.items()
        }
        with inference(context.threads):
            choice = self.choose(candidates, macs if self.latency is None else seconds_of_row(made), left)
        whole = TorchModel(copy.deepcopy(made.module), made.spec)
        chosen = {
            name: splits[name] for name in execution_order(made, {name: splits[name].conv for name in choice.ranks})
        }
        self._fill(chosen, bases, choice)
        if self.asymmetric:
            self._fit_in_turn(made, whole, chosen, context)
        else:
            self._fit(made, chosen, context)
        settle_batch_norm(made, choice.ranks, context.base.data("calibration", self.samples, made.spec), context.base)
        with inference(context.threads):
            reached = {"latency_ratio": ratio_of(made, whole)} if self.times else {}
        return Applied(
            made,
            {"ranks": {name: list(ranks) for name, ranks in choice.ranks.items()}, "left": choice.left},
            {
                "macs_ratio": count_macs(made) / macs,
                "parameters_ratio": count_parameters(made) / parameters,
                "layers": len(choice.ranks),
                **reached,
            },
        )

    def rebuild_structure(self, module: nn.Module, decisions: Mapping[str, Json]) -> nn.Module:
        from torch import nn

        from leanserve.passes.toolkit.conv_splits import SCHEMES
        from leanserve.passes.toolkit.structure import replace

        for name, ranks in decisions["ranks"].items():
            conv = cast("nn.Conv2d", module.get_submodule(name))
            chain = SCHEMES[self.scheme](conv).chain(tuple(ranks), bias=self._has_bias(conv))
            replace(module, conv, nn.Sequential(*chain).eval())
        return module

    def _splits(self, model: TorchModel) -> tuple[dict[str, ConvSplit], dict[str, str]]:
        """The convolutions that the scheme can split, and why the others cannot be."""
        from torch import nn

        from leanserve.passes.toolkit.conv_splits import SCHEMES
        from leanserve.passes.toolkit.layer_calls import trace_calls

        scheme = SCHEMES[self.scheme]
        layers = self.targets.select(model.module, nn.Conv2d)
        calls = trace_calls(model, layers)
        unfit = {name: scheme.unfit(conv) if calls[name] else "it is not used" for name, conv in layers.items()}
        left = {name: reason for name, reason in unfit.items() if reason}
        return {name: scheme(conv, calls[name]) for name, conv in layers.items() if name not in left}, left

    def _bases(
        self, model: TorchModel, splits: Mapping[str, ConvSplit], context: BuildContext
    ) -> dict[str, tuple[Basis, ...]]:
        if self.approximate == "output":
            self._watch(model, splits, context, "look")
        return {name: split.bases(self.approximate) for name, split in splits.items()}

    def _losses(
        self,
        model: TorchModel,
        splits: Mapping[str, ConvSplit],
        bases: Mapping[str, tuple[Basis, ...]],
        context: BuildContext,
    ) -> dict[str, Losses]:
        from torch import nn

        from leanserve.passes.toolkit.activations import observe
        from leanserve.passes.toolkit.layer_losses import losses_by_layer

        def chains(name: str, ranks: Sequence[Ranks], data: Data) -> list[nn.Module]:
            conv = splits[name].conv
            trials = [splits[name].trial(bases[name], item, bias=self._has_bias(conv)) for item in ranks]
            if self.approximate == "output":
                observe(model, {name: conv}, data, partial(_compare, trials), lambda *_: None)
                for trial in trials:
                    trial.refit()
            return [nn.Sequential(*trial.convs).eval() for trial in trials]

        layers = {name: split.conv for name, split in splits.items()}
        return losses_by_layer(model, layers, chains, self.samples, context)

    def _fill(self, splits: Mapping[str, ConvSplit], bases: Mapping[str, tuple[Basis, ...]], choice: Choice) -> None:
        for name, split in splits.items():
            split.fill(bases[name], choice.ranks[name], bias=self._has_bias(split.conv))

    def _fit(self, model: TorchModel, splits: Mapping[str, ConvSplit], context: BuildContext) -> None:
        """Fit all at once, each to the layer that it takes the place of, and put them there."""
        from torch import nn

        from leanserve.passes.toolkit.structure import replace

        if self.approximate == "output":
            self._watch(model, splits, context, "compare")
        for split in splits.values():
            if self.approximate == "output":
                split.refit()
            replace(model.module, split.conv, nn.Sequential(*split.convs).eval())

    def _fit_in_turn(
        self, model: TorchModel, whole: TorchModel, splits: Mapping[str, ConvSplit], context: BuildContext
    ) -> None:
        """Put each in its place and fit it to the whole model's layer, by what the layers before it give now."""
        from torch import nn

        from leanserve.passes.toolkit.activations import observe_beside
        from leanserve.passes.toolkit.structure import replace

        data = context.base.data("calibration", self.samples, model.spec)
        for done, (name, split) in enumerate(splits.items()):
            context.progress(done, len(splits), "fitting layers")
            replace(model.module, split.conv, nn.Sequential(*split.convs).eval())
            observe_beside(model, whole, name, data, partial(_compare, [split]))
            split.refit()

    def _watch(
        self,
        model: TorchModel,
        splits: Mapping[str, ConvSplit],
        context: BuildContext,
        step: Literal["look", "compare"],
    ) -> None:
        from leanserve.passes.toolkit.activations import observe

        layers = {name: split.conv for name, split in splits.items()}
        data = context.base.data("calibration", self.samples, model.spec)
        observe(model, layers, data, lambda name, x, y: getattr(splits[name], step)(x, y), context.progress)

    def _has_bias(self, conv: nn.Conv2d) -> bool:
        """Fitted outputs need a bias to keep their mean."""
        return conv.bias is not None or self.approximate == "output"


def _compare(splits: Sequence[ConvSplit], _: str, x: Tensor, y: Tensor) -> None:
    for split in splits:
        split.compare(x, y)
