"""Which nodes of an ONNX graph should compute in 8 bits, and the graph in which they do.

A quantized graph is fast where int8 tensors flow from kernel to kernel, and slow where they are converted back and
forth. *Layers* (convolution, Gemm, MatMul with constant weights) do the arithmetic. *Carriers* (activation, residual
addition, pooling, reshaping) must take and give int8 between such layers and must stay float anywhere else: there each
conversion costs time and precision and buys nothing. A MatMul hands on float: in transformers it feeds biases, residual
sums and norms, which need the precision. Attention's products of two activations stay float unless they are asked for.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np
import onnx
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import QuantizationMode, QuantType

from leanserve.passes.toolkit.histograms import Range
from leanserve.passes.toolkit.onnx_graph import LAYERS, Graph

ACTIVATIONS = frozenset({"Relu", "Clip"})
"""Cost nothing after an int8 layer: the range of its output does the cutting."""
CARRIERS = ACTIVATIONS | frozenset(
    {"Add", "AveragePool", "Concat", "Flatten", "GlobalAveragePool", "LeakyRelu", "MaxPool", "Mul", "Reshape", "Resize"}
    | {"Sigmoid", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
GIVES_FLOAT = frozenset({"Gemm", "MatMul"})
"""Layers whose kernels can give float at no cost; they do where no int8 node reads their output."""

Weights = Literal["per_channel", "per_tensor"]
ReduceRange = Literal["auto", "on", "off"]
Bits = Literal[7, 8]
Nodes = Sequence[onnx.NodeProto]


def weight_bits(choice: ReduceRange, isa: Collection[str]) -> Bits:
    """Bits of a weight: by itself 8 where the CPU sums products of bytes exactly, else 7, as sums of two overflow."""
    if choice == "auto":
        return 8 if {"avx512_vnni", "avx_vnni", "amx_int8", "asimd"} & set(isa) else 7
    return 7 if choice == "on" else 8


def int8_nodes(graph: Graph, kept: Collection[str], *, attention: bool = False) -> Nodes:
    """The layers and the carriers between them, in the order of the graph, without the nodes named in `kept`.

    `attention`: the products of two activations, too.
    """
    layers = {node.name for node in graph.layers}
    if attention:
        layers |= {node.name for node in graph.nodes if node.op_type == "MatMul" and {*node.input} <= {*graph.shapes}}
    chosen: list[onnx.NodeProto] = []
    emitted: set[str] = set()
    for node in graph.nodes:
        if node.name not in kept and (node.name in layers or _carries(graph, node, emitted)):
            chosen.append(node)
            emitted |= set() if node.op_type == "MatMul" else set(node.output)
    return _without_trailing(chosen)


def _carries(graph: Graph, node: onnx.NodeProto, emitted: Collection[str]) -> bool:
    """Whether this is a carrier and all that it takes (constants and shapes apart) comes as int8."""
    if node.op_type not in CARRIERS or node.output[0] not in graph.shapes:
        return False
    if node.op_type == "Clip" and not _holds_zero(graph, node):
        return False
    taken = [name for name in node.input if name in graph.shapes]
    return bool(taken) and all(name in emitted for name in taken)


def _holds_zero(graph: Graph, clip: onnx.NodeProto) -> bool:
    """Whether the bounds of a Clip hold zero, as every int8 range does; not if they are computed."""
    low, high = [*clip.input[1:3], "", ""][:2]
    return _scalar(graph, low, -np.inf) <= 0 <= _scalar(graph, high, np.inf)


def _scalar(graph: Graph, name: str, default: float) -> float:
    if not name:
        return default
    return float(onnx.numpy_helper.to_array(graph.constants[name])) if name in graph.constants else np.nan


def _without_trailing(chosen: Nodes) -> Nodes:
    """Without carriers whose int8 output nobody takes as int8."""
    taken: set[str] = set()
    needed: list[onnx.NodeProto] = []
    for node in reversed(chosen):
        if node.op_type in LAYERS | ACTIVATIONS or taken & set(node.output):
            needed.append(node)
            taken |= set(node.input)
    return needed[::-1]


def int8_tensors(graph: Graph, chosen: Nodes) -> Sequence[str]:
    """The activations whose range must be known: what the chosen nodes take or give as int8.

    A tensor that only an activation reads is left out: it gets the range of what the activation gives.
    """
    cut = _cut_by(graph, chosen)
    taken = {name for node in chosen for name in node.input}
    given = {name for node in chosen for name in node.output if node.op_type not in GIVES_FLOAT}
    ordered = dict.fromkeys(name for node in chosen for name in (*node.input, *node.output))
    return [name for name in ordered if name in graph.shapes and name in taken | given and name not in cut]


def symmetric_ranges(graph: Graph, ranges: Mapping[str, Range]) -> dict[str, Range]:
    """The ranges as wide below zero as above it; not those of one sign, nor of activations, which do their cutting."""
    cutting = {name for node in graph.nodes if node.op_type in ACTIVATIONS for name in node.output}
    return {
        name: (low, high) if name in cutting or not low < 0 < high else (-max(-low, high), max(-low, high))
        for name, (low, high) in ranges.items()
    }


def _cut_by(graph: Graph, chosen: Nodes) -> dict[str, str]:
    """From each tensor that nothing but one chosen activation reads to what the activation gives."""
    readers = Counter(name for node in graph.nodes for name in node.input)
    readers.update(item.name for item in graph.model.graph.output)
    activations = [node for node in chosen if node.op_type in ACTIVATIONS]
    return {node.input[0]: node.output[0] for node in activations if readers[node.input[0]] == 1}


class _Quantizer(QDQQuantizer):  # type: ignore[misc] # its base is not typed
    """onnxruntime's quantizer, told which activations to quantize instead of taking all that touch a chosen node."""

    def quantize_activation_tensor(self, tensor_name: str) -> None:
        if tensor_name in self.tensors_range or tensor_name in self.initializers:
            super().quantize_activation_tensor(tensor_name)


def quantized(
    graph: Graph, chosen: Nodes, ranges: Mapping[str, Range], weights: Weights, bits: Bits
) -> onnx.ModelProto:
    """The graph with QuantizeLinear and DequantizeLinear around the chosen nodes, which runtimes fuse to int8 kernels.

    Activations are unsigned 8 bit over the given ranges, weights signed and symmetric: what x86 multiplies fastest.
    """
    spread = {**ranges, **{before: ranges[after] for before, after in _cut_by(graph, chosen).items()}}
    data = {name: TensorData(lowest=np.float32(low), highest=np.float32(high)) for name, (low, high) in spread.items()}
    quantizer = _Quantizer(
        copy.deepcopy(graph.model),
        per_channel=weights == "per_channel",
        reduce_range=bits == 7,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, data),
        nodes_to_quantize=[node.name for node in chosen],
        nodes_to_exclude=[],
        op_types_to_quantize=sorted({node.op_type for node in chosen}),
        extra_options={},
    )
    quantizer.quantize_model()
    return _finished(quantizer)


def dynamically_quantized(graph: Graph, chosen: Nodes, weights: Weights, bits: Bits) -> onnx.ModelProto:
    """The graph with int8 weights in the chosen Gemm, MatMul and LSTM nodes, their inputs quantized while running."""
    names = [f"{node.name}_MatMul" if node.op_type == "Gemm" else node.name for node in chosen]
    quantizer = ONNXQuantizer(
        copy.deepcopy(graph.model),
        per_channel=weights == "per_channel",
        reduce_range=bits == 7,
        mode=QuantizationMode.IntegerOps,
        static=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=None,
        nodes_to_quantize=names,  # it first writes every Gemm as a MatMul of this name and an Add
        nodes_to_exclude=[],
        op_types_to_quantize=["MatMul", "LSTM"],
        extra_options={"MatMulConstBOnly": True},
    )
    quantizer.quantize_model()
    return _finished(quantizer)


def _finished(quantizer: QDQQuantizer | ONNXQuantizer) -> onnx.ModelProto:
    quantizer.model.topological_sort()
    model: onnx.ModelProto = quantizer.model.model
    return model
