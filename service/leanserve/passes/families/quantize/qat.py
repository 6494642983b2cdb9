"""Train for 8 bits with the rounding in place, then quantize: for models that lose too much when it comes afterwards.

The model answers like the base (Hinton et al. 2015), needs no labels, and computes with rounded weights and rounded
layer inputs while it learns to (Jacob et al. 2018). Rounded is what `quantize_static` quantizes, over ranges that start
as calibrated and are trained too (Esser et al. 2020); in the last part of the training they stand still. What comes out
is the same graph as `quantize_static` writes, as fast and as small, with other weights and ranges. It costs minutes of
training. Batch norms are folded before, for they are in the layers that are rounded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from leanserve.contracts import BuildContext, Model, OnnxModel, TorchModel
from leanserve.errors import PassFailed
from leanserve.hardware import Hardware
from leanserve.passes.base import EXPORTED, Applied, Need, Pass, Stage, Tag
from leanserve.passes.toolkit.int8_on_gpu import no_int8_on_gpu
from leanserve.passes.toolkit.static_quantization import StaticOptions
from leanserve.passes.toolkit.training import train
from leanserve.passes.toolkit.training_options import TrainingOptions

if TYPE_CHECKING:
    from torch import nn

    from leanserve.passes.toolkit.learned_ranges import LearnedRanges, Point
    from leanserve.passes.toolkit.static_quantization import Calibrated
    from leanserve.passes.toolkit.training_run import Trained


class Qat(TrainingOptions, Pass):
    """Train with rounded weights and layer inputs to answer like the base, and quantize what that gives."""

    kind: Literal["qat"] = "qat"
    epochs: PositiveInt = 3
    learning_rate: PositiveFloat = 2e-4
    """The peak, a tenth of `distill`'s: the model is nearly there."""
    loss: Literal["auto", "kl", "mse", "cosine"] = "auto"
    """As in `distill`."""
    freeze: float = Field(default=0.75, gt=0, le=1)
    """Share of the steps after which ranges stand still; 1: they never do."""
    quantize: StaticOptions = StaticOptions()
    """Options of `quantize_static`."""
    keep_float: tuple[str, ...] = ()
    """Globs of node names (`head/*`) or operator types (`Gemm`) that stay float32."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "exportable", "float_weights"})
    forbids: ClassVar[frozenset[Tag]] = frozenset({"runtime"})
    produces: ClassVar[frozenset[Tag]] = frozenset({"onnx_graph"})
    removes: ClassVar[frozenset[Tag]] = EXPORTED | {"float_weights"}
    stage: ClassVar[Stage] = Stage.PRECISION
    libraries: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")
    isa_bound: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[Need]:
        return self.training_needs | {"calibration"}

    def unsupported_reason(self, hardware: Hardware) -> str | None:
        return no_int8_on_gpu(hardware)

    def apply(self, model: Model, context: BuildContext) -> Applied:
        import onnx

        from leanserve.passes.toolkit.onnx_graph import fused_graph
        from leanserve.passes.toolkit.structure import copy_of

        student = copy_of(model, self.kind)
        _refuse_norms(student.module)
        graph = fused_graph(student, context.scratch)
        kept = graph.matching(self.keep_float)
        if all(node.name in kept for node in graph.layers):
            raise PassFailed("qat finds no convolution or linear layer to train in 8 bits, or keep_float keeps all")
        before = self.quantize.calibrated(graph, [kept], student, context)
        points = _points(before, student.module, kept)
        ranges, outcome = self._trained(student, points, before, context)
        trained = fused_graph(student, context.scratch)
        after = self.quantize.calibrated(trained, [kept], student, context)
        after = replace(after, ranges={**after.ranges, **ranges.found()})
        path = context.scratch / "int8.onnx"
        onnx.save(after.quantized(kept), path)
        left = after.left(kept)
        facts = {"first_loss": outcome.first_loss, "last_loss": outcome.last_loss, "epochs": outcome.epochs}
        facts |= {"trained_layers": len(points), "float_layers": len(left)}
        return Applied(OnnxModel(path, model.spec), {"float_layers": left, "weight_bits": after.bits}, facts)

    def _trained(
        self, student: TorchModel, points: list[Point], calibrated: Calibrated, context: BuildContext
    ) -> tuple[LearnedRanges, Trained]:
        """Train the student in place; its weights afterwards are those that were rounded."""
        from leanserve.passes.toolkit.callbacks import usual_callbacks
        from leanserve.passes.toolkit.learned_ranges import FreezeRanges, LearnedRanges, MatchRounded, RoundedLayers
        from leanserve.passes.toolkit.masks import masks_of
        from leanserve.passes.toolkit.rounding import LARGEST
        from leanserve.passes.toolkit.teacher import TeacherTerms, require_inputs_of

        require_inputs_of(context.base, student, self.kind)
        ranges = LearnedRanges({point.tensor: calibrated.ranges[point.tensor] for point in points})
        masks = {_original(name, points): mask for name, mask in masks_of(student).items()}
        largest, weights = LARGEST[calibrated.bits], self.quantize.weights
        rounding = RoundedLayers(student.module, points, ranges, largest, weights)
        try:
            objective = MatchRounded(student, context.base, TeacherTerms(self.loss), ranges)
            masked = replace(student, masks=masks)
            callbacks = [*usual_callbacks(masked, self, context), FreezeRanges(ranges, self.freeze)]
            outcome = train(student.module, objective, context.base.data("train"), self, callbacks, context)
        finally:
            rounding.remove()
        ranges.cpu()
        return ranges, outcome


def _refuse_norms(module: nn.Module) -> None:
    from torch.nn.modules.batchnorm import _BatchNorm

    if norms := [name for name, child in module.named_modules() if isinstance(child, _BatchNorm)]:
        raise PassFailed(f"qat rounds the layers that serve, into which batch norms are folded: put fold_bn before it "
                         f"(the first norm is {norms[0]})")  # fmt: skip


def _points(calibrated: Calibrated, module: nn.Module, kept: frozenset[str]) -> list[Point]:
    """The layers of the module that become integer, by the names that the exporter gave their nodes."""
    from torch import nn

    from leanserve.passes.toolkit.learned_ranges import Point

    layers = {
        name: child for name, child in module.named_modules() if isinstance(child, nn.Linear | nn.Conv2d | nn.Conv1d)
    }
    graph = calibrated.graph
    chosen = {node.name for node in calibrated.nodes(kept)} & {node.name for node in graph.layers}
    found = {}
    for node in graph.layers:
        owner = node.name.rpartition("/")[0]
        if node.name in chosen and owner in layers and node.input[0] in calibrated.ranges:
            found[owner] = Point(owner, node.input[0])
    return list(found.values())


def _original(name: str, points: list[Point]) -> str:
    """What a weight is called while it is rounded."""
    layer, _, last = name.rpartition(".")
    rounded = last == "weight" and any(point.layer == layer for point in points)
    return f"{layer}.parametrizations.weight.original" if rounded else name
