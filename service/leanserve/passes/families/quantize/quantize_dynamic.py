"""Linear layers in 8-bit integers, with activation ranges measured anew in every batch: no calibration data needed.

Weights are int8 (symmetric, per output channel), activations uint8 with a scale found at run time (Zafrir et al. 2019,
"Q8BERT"), one per vector that is multiplied: per row, in a transformer per token (Dettmers et al. 2022, "LLM.int8()").
That suits transformers, whose activations vary from input to input, and divides the weights by four. It costs passes
over each activation, which a matrix product outweighs and a convolution does not: onnxruntime's dynamic convolution is
slower than float32, so convolutional nets are refused.

One scale per tensor, as in onnxruntime's own kernel, costs less. But a tensor holds the rows of a whole batch, and one
stranger's large value then wipes out the answers of all others. LSTMs have no other kernel: onnxruntime finds one scale
for the frames of a whole batch, so that they are quantized only where `scale: tensor` says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from leanserve.contracts import BuildContext, Model, OnnxModel
from leanserve.errors import PassFailed
from leanserve.hardware import Hardware
from leanserve.passes.base import EXPORTED, Applied, Pass, Stage, Tag
from leanserve.passes.toolkit.int8_on_gpu import no_int8_on_gpu

if TYPE_CHECKING:
    from leanserve.passes.toolkit.onnx_graph import Graph

Operator = Literal["MatMul", "Gemm", "LSTM", "Conv"]
Scale = Literal["row", "tensor"]

SLOW_CONV = "a dynamically quantized convolution is slower than a float32 one; use quantize_static"


class QuantizeDynamic(Pass):
    """Quantize the weights of linear layers, and their inputs while running."""

    kind: Literal["quantize_dynamic"] = "quantize_dynamic"
    ops: tuple[Operator, ...] = Field(default=("MatMul", "Gemm"), min_length=1)
    """Operator types to quantize. `nn.Linear` is Gemm on [rows, features], MatMul on more axes. LSTM asks for `scale:
    tensor`. Conv is refused."""
    weights: Literal["per_channel", "per_tensor"] = "per_channel"
    """One scale per output feature, or one per layer: smaller tables, lower accuracy."""
    scale: Scale = "row"
    """One scale of activations per vector, or one per tensor: a little faster, and rows of a batch share it."""
    reduce_range: Literal["auto", "on", "off"] = "auto"
    """Whether weights use 7 of their 8 bits. `auto`: only on CPUs whose sums of 8-bit products overflow (no VNNI)."""
    keep_float: tuple[str, ...] = ()
    """Globs of node names (`head/*`) or operator types (`Gemm`) that stay float32."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"exportable", "float_weights"})
    forbids: ClassVar[frozenset[Tag]] = frozenset({"runtime"})
    produces: ClassVar[frozenset[Tag]] = frozenset({"onnx_graph", "dynamic_ranges"})
    removes: ClassVar[frozenset[Tag]] = EXPORTED | {"float_weights"}
    stage: ClassVar[Stage] = Stage.PRECISION
    libraries: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")
    isa_bound: ClassVar[bool] = True

    @field_validator("ops")
    @classmethod
    def _without_conv(cls, ops: tuple[Operator, ...]) -> tuple[Operator, ...]:
        if "Conv" in ops:
            raise ValueError(SLOW_CONV)
        return ops

    @model_validator(mode="after")
    def _recurrence_by_tensor(self) -> Self:
        if "LSTM" in self.ops and self.scale == "row":
            raise ValueError("onnxruntime quantizes an LSTM with one scale for all rows of a batch: say scale: tensor")
        return self

    def unsupported_reason(self, hardware: Hardware) -> str | None:
        return no_int8_on_gpu(hardware)

    def apply(self, model: Model, context: BuildContext) -> Applied:
        import onnx

        from leanserve.passes.toolkit.int8_graph import dynamically_quantized, weight_bits
        from leanserve.passes.toolkit.onnx_graph import fused_graph, is_plain
        from leanserve.passes.toolkit.row_scales import quantized_by_row

        graph = fused_graph(model, context.scratch)
        _refuse_convolutional(graph)
        kept = graph.matching(self.keep_float)
        layers = (*graph.layers, *graph.recurrent)
        able = [node for node in layers if node.op_type in self.ops and is_plain(node)]
        chosen = [node for node in able if node.name not in kept]
        names = {node.name for node in chosen}
        left = [node.name for node in layers if node.name not in names]
        if not chosen:
            raise PassFailed(
                f"quantize_dynamic would quantize nothing: ops {', '.join(self.ops)} and keep_float leave every layer "
                f"float ({', '.join(left) or 'there is none with constant weights'}); change them or drop the pass"
            )
        bits = weight_bits(self.reduce_range, context.hardware.isa)
        path = context.scratch / "int8.onnx"
        write = quantized_by_row if self.scale == "row" else dynamically_quantized
        onnx.save(write(graph, chosen, self.weights, bits), path)
        return Applied(
            OnnxModel(path, model.spec),
            {"float_layers": left, "weight_bits": bits},
            {"int8_nodes": len(chosen), "float_layers": len(left)},
        )


def _refuse_convolutional(graph: Graph) -> None:
    total = sum(map(graph.macs, graph.layers))
    share = sum(graph.macs(node) for node in graph.layers if node.op_type == "Conv") / max(1, total)
    if share > 0.5:
        raise PassFailed(f"quantize_dynamic: convolutions do {share:.0%} of this model's arithmetic, and {SLOW_CONV}")
