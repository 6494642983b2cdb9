"""Quantize to 8 bits what bears it: layers that cost too much stay float, until the answers are as near as asked for.

Each layer is quantized alone and the model's outputs are compared with those in float (`toolkit.layer_damage`). Then
all are quantized, and the worst go back to float, first one, then two, four and so on, until the loss on the
calibration split is at most `max_drop`; what was given back too much is taken again by bisection. The loss is measured
on answers, against those of the model in float, and needs no labels. It costs a run of some rows per layer, and an
evaluation per step; what has been found out is kept, so that an interrupted search goes on. The gate's rows are never
looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from leanserve.contracts import BuildContext, Json, Model, ModelSpec, OnnxModel
from leanserve.errors import PassFailed
from leanserve.hardware import Hardware
from leanserve.passes.base import EXPORTED, Applied, Need, Pass, Stage, Tag
from leanserve.passes.toolkit.int8_on_gpu import no_int8_on_gpu
from leanserve.passes.toolkit.static_quantization import StaticOptions

if TYPE_CHECKING:
    from leanserve.passes.toolkit.layer_damage import Damage
    from leanserve.passes.toolkit.notes import Notes
    from leanserve.passes.toolkit.static_quantization import Calibrated


class QuantizeSelect(StaticOptions, Pass):
    """Find the layers to keep float, and quantize all others as `quantize_static` does."""

    kind: Literal["quantize_select"] = "quantize_select"
    max_drop: float = Field(default=0.01, ge=0, lt=1)
    """What quantizing may lose on the calibration split, of agreement with the base, or of the score: of what the model
    has in float, which passes before this one may have lowered."""
    by: Literal["agreement", "score"] = "agreement"
    """What may be lost. Agreement needs no labels."""
    rank: Literal["auto", "sqnr", "kl"] = "auto"
    """By what layers are ranked; `auto`: divergence where an output has classes, else signal-to-noise ratio."""
    probe: PositiveInt = 64
    """Rows of the calibration split on which layers are ranked."""
    most: float = Field(default=0.5, gt=0, le=1)
    """Share of the layers that may stay float."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"exportable", "float_weights"})
    forbids: ClassVar[frozenset[Tag]] = frozenset({"runtime"})
    produces: ClassVar[frozenset[Tag]] = frozenset({"onnx_graph"})
    removes: ClassVar[frozenset[Tag]] = EXPORTED | {"float_weights"}
    stage: ClassVar[Stage] = Stage.PRECISION
    libraries: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")
    isa_bound: ClassVar[bool] = True

    @property
    def evaluates(self) -> bool:
        return True

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"})

    def unsupported_reason(self, hardware: Hardware) -> str | None:
        return no_int8_on_gpu(hardware)

    def apply(self, model: Model, context: BuildContext) -> Applied:
        import onnx

        from leanserve.passes.toolkit.layer_damage import ranked, table
        from leanserve.passes.toolkit.notes import Notes
        from leanserve.passes.toolkit.onnx_graph import fused_graph

        graph = fused_graph(model, context.scratch)
        layers = [node.name for node in graph.layers]
        if not layers:
            raise PassFailed(
                "quantize_select finds no convolution or linear layer with constant weights; drop the pass"
            )
        single = [frozenset(layers) - {name} for name in layers]
        calibrated = self.calibrated(graph, [frozenset(), *single], model, context)
        notes = Notes(context.scratch / "selection.json")
        damages = ranked(self._damages(calibrated, model.spec, notes, context), self._ranking(model))
        path = context.scratch / "int8.onnx"

        def lost(count: int) -> float:
            onnx.save(calibrated.quantized(frozenset(item.layer for item in damages[:count])), path)
            whole = float(notes.once("in float", lambda: self._worth(model, context)))
            return whole - self._worth(OnnxModel(path, model.spec), context)

        search = _Search(notes, lost, self.max_drop)
        kept = search.least(max(1, int(self.most * len(layers))))
        if kept is None:
            raise PassFailed(self._out_of_reach(search.trail))
        names = {item.layer: item for item in damages[:kept]}
        onnx.save(calibrated.quantized(frozenset(names)), path)
        trail = [{"layers in float": count, f"loss of {self.by}": value} for count, value in search.trail]
        return Applied(
            OnnxModel(path, model.spec),
            {"float_layers": sorted(names), "weight_bits": calibrated.bits,
             "tables": {"layers": table(damages, names), "search": trail}},
            {"float_layers": kept, "layers": len(layers), "loss": dict(search.trail)[kept]},
        )  # fmt: skip

    def _ranking(self, model: Model) -> Literal["sqnr", "kl"]:
        from leanserve.contracts import CLASSES

        classes = any(item.meaning in CLASSES for item in model.spec.outputs)
        if self.rank == "kl" and not classes:
            raise PassFailed("quantize_select.rank is kl, but no output has classes; take sqnr")
        return ("kl" if classes else "sqnr") if self.rank == "auto" else self.rank

    def _damages(self, calibrated: Calibrated, spec: ModelSpec, notes: Notes, context: BuildContext) -> list[Damage]:
        """Of each layer, quantized alone."""
        from leanserve.passes.toolkit.layer_damage import Damage, damage, outputs_of

        layers = [node.name for node in calibrated.graph.layers]
        data = context.base.data("calibration", self.probe, spec)
        batches = [batch.inputs for batch in data.batches(self.batch)]
        reference = outputs_of(calibrated.graph.model, spec, batches, context.threads)

        def measured(name: str) -> Json:
            alone = calibrated.quantized(frozenset(layers) - {name})
            return damage(name, outputs_of(alone, spec, batches, context.threads), reference, spec)._asdict()

        found = []
        for done, name in enumerate(layers, start=1):
            found.append(Damage(**notes.once(f"layer {name}", partial(measured, name))))
            context.progress(done, len(layers), "quantizing layers one by one")
        return found

    def _worth(self, model: Model, context: BuildContext) -> float:
        """On the calibration split: agreement with the base, or the score."""
        found = context.evaluate(model)
        if self.by == "agreement":
            return found.agreement
        if found.score is None:
            raise PassFailed("quantize_select.by is score, but the calibration split has no labels; take agreement")
        return found.score

    def _out_of_reach(self, trail: Sequence[tuple[int, float]]) -> str:
        count, least = min(trail, key=lambda item: item[1])
        return (
            f"quantize_select.max_drop {self.max_drop:g} is out of reach: with {count} layers in float the loss of "
            f"{self.by} is {least:.4f}; allow more in max_drop or most, put smooth before it, or take another pass"
        )


class _Search:
    """The least number of layers, of the worst, whose loss is accepted; each number is tried once."""

    def __init__(self, notes: Notes, lost: Callable[[int], float], accepted: float) -> None:
        self._notes, self._lost, self._accepted = notes, lost, accepted
        self.trail: list[tuple[int, float]] = []

    def least(self, most: int) -> int | None:
        """At most so many; `None` if that does not do."""
        short, count = -1, 0
        while not self._fits(count):
            if count == most:
                return None
            short, count = count, min(most, max(1, 2 * count))
        while count - short > 1:
            middle = (short + count) // 2
            short, count = (short, middle) if self._fits(middle) else (middle, count)
        return count

    def _fits(self, count: int) -> bool:
        value = float(self._notes.once(f"kept {count}", lambda: self._lost(count)))
        self.trail.append((count, value))
        return value <= self._accepted
