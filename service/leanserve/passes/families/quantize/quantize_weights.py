"""Weights in 8, 4, 3 or 2 bits, in small groups with a step each; activations stay float.

That buys size on disk and in memory: a model of 4 bits takes an eighth of float32, and a sixth with the steps of its
groups. It buys time only where memory is the limit, as in large models that answer a single row; on encoders of some
million parameters the kernel is about as fast as float32, or slower. What was gained in time is measured and stands in
the report (`speedup`). Convolutions have no such kernel and stay float.

The codes are chosen by `rtn`, `hqq`, `gptq` or `awq` (`toolkit.group_codes`), which matters from 4 bits down.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from pydantic import PositiveInt

from leanserve.contracts import BuildContext, Model, OnnxModel
from leanserve.errors import PassFailed
from leanserve.passes.base import EXPORTED, Applied, Need, Pass, Stage, Tag

if TYPE_CHECKING:
    import onnx

    from leanserve.passes.toolkit.group_graph import GroupedLayer
    from leanserve.passes.toolkit.histograms import Floats
    from leanserve.passes.toolkit.onnx_graph import Graph

ROWS = 4
"""Rows of the batch on which the speed is compared."""


class Seen(NamedTuple):
    """What calibration rows say of a tensor [..., inputs]: mean outer products, and mean absolute values."""

    moments: Floats
    magnitudes: Floats


class QuantizeWeights(Pass):
    """Store the weights of linear layers and embeddings in few bits, and multiply by them as they are."""

    kind: Literal["quantize_weights"] = "quantize_weights"
    bits: Literal[8, 4, 3, 2] = 4
    """Of the weights of linear layers. 3 bits are stored as such and take 4 in memory."""
    group: Literal[16, 32, 64, 128] = 32
    """Inputs of an output that share a step: fewer are more accurate and larger."""
    method: Literal["rtn", "hqq", "gptq", "awq"] = "gptq"
    """How codes are chosen: the nearest; by a norm that forgives outliers; by the error of the layer's outputs, input
    by input (`gptq`) or with scaled inputs (`awq`)."""
    embeddings: Literal[8, 4, "float"] = 8
    """Bits of tables that rows are looked up in."""
    keep_float: tuple[str, ...] = ()
    """Globs of node names (`head/*`) or operator types (`Gather`) that stay float32."""
    samples: PositiveInt = 128
    """Rows of the calibration split that `gptq` and `awq` look at."""
    batch: PositiveInt = 8
    """Rows per batch while they do: bounds the memory."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"exportable", "float_weights"})
    forbids: ClassVar[frozenset[Tag]] = frozenset({"runtime"})
    produces: ClassVar[frozenset[Tag]] = frozenset({"onnx_graph"})
    removes: ClassVar[frozenset[Tag]] = EXPORTED | {"float_weights"}
    stage: ClassVar[Stage] = Stage.PRECISION
    libraries: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"calibration"}) if self._looks else frozenset()

    @property
    def _looks(self) -> bool:
        return self.method in {"gptq", "awq"}

    def apply(self, model: Model, context: BuildContext) -> Applied:
        import onnx

        from leanserve.passes.toolkit.group_codes import rtn
        from leanserve.passes.toolkit.group_graph import GroupWriter
        from leanserve.passes.toolkit.onnx_graph import fused_graph

        graph = fused_graph(model, context.scratch)
        layers, tables = self._chosen(graph)
        seen = self._seen(graph, model, layers, context) if self._looks else {}
        grouped = self._grouped(graph, layers, seen, context)
        table_bits = 8 if self.embeddings == "float" else self.embeddings
        coded = {
            node.name: rtn(onnx.numpy_helper.to_array(graph.constants[node.input[0]]), table_bits, self.group)
            for node in tables
        }
        before, after = context.scratch / "before.onnx", context.scratch / "codes.onnx"
        onnx.save(graph.model, before)
        onnx.save(GroupWriter(graph, self.bits).written(grouped, coded, table_bits), after)
        made = OnnxModel(after, model.spec)
        left = [node.name for node in (*graph.layers, *graph.tables) if node.name not in {**grouped, **coded}]
        facts: dict[str, float] = {"layers": len(layers), "embeddings": len(tables), "float_layers": len(left)}
        facts["size_ratio"] = after.stat().st_size / before.stat().st_size
        facts["speedup"] = _speedup(OnnxModel(before, model.spec), made, context)
        return Applied(made, {"float_layers": left}, facts)

    def _chosen(self, graph: Graph) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
        """The matrix products and the embeddings to quantize."""
        from leanserve.passes.toolkit.onnx_graph import is_plain

        kept = graph.matching(self.keep_float)
        products = [node for node in graph.layers if node.op_type != "Conv" and is_plain(node)]
        layers = [node for node in products if node.name not in kept]
        if not layers:
            names = ", ".join(node.name for node in graph.layers) or "there is none with constant weights"
            raise PassFailed(
                f"quantize_weights has no linear layer to quantize: convolutions have no kernel for it and keep_float "
                f"leaves the others float ({names}); change it, or take quantize_static"
            )
        tables = [] if self.embeddings == "float" else [node for node in graph.tables if node.name not in kept]
        return layers, [node for node in tables if self._fits(graph, node)]

    def _fits(self, graph: Graph, node: onnx.NodeProto) -> bool:
        """Whether a table has whole groups, as its kernel wants them."""
        return int(graph.constants[node.input[0]].dims[1]) % self.group == 0

    def _seen(
        self, graph: Graph, model: Model, layers: Iterable[onnx.NodeProto], context: BuildContext
    ) -> dict[str, Seen]:
        """What the calibration rows say of each tensor that the layers read.

        Raises:
            PassFailed: there are no rows, or a tensor holds NaN or infinity.
        """
        import numpy as np

        from leanserve.passes.toolkit.calibration import Recording, watched

        data = context.base.data("calibration", self.samples, model.spec)
        if not len(data):
            raise PassFailed(
                f"quantize_weights.method {self.method} calibrates with data, but the base's calibration split is "
                "empty; take rtn or hqq"
            )
        sources = list(dict.fromkeys(node.input[0] for node in layers))
        recording = Recording(graph.model, model.spec, sources, data, self.batch, context.threads)
        moments: dict[str, Floats] = {}
        magnitudes: dict[str, Floats] = {}
        counts: dict[str, int] = dict.fromkeys(sources, 0)
        for activations in watched(recording, context.progress, "watching layers"):
            for name, values in activations.items():
                vectors = values.reshape(-1, values.shape[-1])
                moments[name] = moments.get(name, 0.0) + (vectors.T @ vectors).astype(np.float64)
                magnitudes[name] = magnitudes.get(name, 0.0) + np.abs(vectors).sum(0, dtype=np.float64)
                counts[name] += len(vectors)
        if broken := [name for name in sources if not np.isfinite(moments[name]).all()]:
            raise PassFailed(f"tensor '{broken[0]}' cannot be calibrated: it contains NaN or infinite values")
        return {name: Seen(moments[name] / counts[name], magnitudes[name] / counts[name]) for name in sources}

    def _grouped(
        self, graph: Graph, layers: Sequence[onnx.NodeProto], seen: Mapping[str, Seen], context: BuildContext
    ) -> dict[str, GroupedLayer]:
        import numpy as np

        from leanserve.passes.toolkit.group_codes import awq_scales, gptq, hqq, rtn
        from leanserve.passes.toolkit.group_graph import GroupedLayer

        kernels = {node.name: graph.kernel(node).astype(np.float64) for node in layers}
        scales: dict[str, Floats] = {}
        if self.method == "awq":
            for source, found in seen.items():
                together = [kernels[node.name] for node in layers if node.input[0] == source]
                scales[source] = awq_scales(together, self.bits, self.group, *found)
        made = {}
        for done, node in enumerate(layers, start=1):
            kernel, factors = kernels[node.name], scales.get(node.input[0])
            if self.method == "gptq":
                codes = gptq(kernel, self.bits, self.group, seen[node.input[0]].moments)
            else:
                solve = hqq if self.method == "hqq" else rtn
                codes = solve(kernel if factors is None else kernel * factors, self.bits, self.group)
            made[node.name] = GroupedLayer(codes, kernel.shape[1], factors)
            context.progress(done, len(layers), "choosing codes")
        return made


def _speedup(before: OnnxModel, after: OnnxModel, context: BuildContext) -> float:
    """Seconds of a small batch in float over those with the codes, in onnxruntime with the threads that serve."""
    from leanserve.passes.toolkit.lowering import feeds, open_session
    from leanserve.passes.toolkit.timing import seconds_per_call

    batch = feeds(before.spec, before.spec.example(before.spec.most_rows(ROWS), length=64, seed=context.seed))
    first, second = (open_session(model.path, context.threads) for model in (before, after))
    ways = {"float": partial(first.run, None, batch), "codes": partial(second.run, None, batch)}
    seconds = seconds_per_call(ways)
    return seconds["float"] / seconds["codes"]
