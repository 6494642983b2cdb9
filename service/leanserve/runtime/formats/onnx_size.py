"""What an ONNX graph costs before it is timed: multiply-accumulates per row, and parameters.

They are counted from the shapes of convolutions and matrix products, attention included. Recurrent
operators and what functions of the model's own do inside are not seen; a graph with them, or with shapes that cannot be
told, counts as 0: unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import compress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from leanserve.contracts import ModelSize
from leanserve.runtime.formats.onnx_session import onnx_session

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

Shapes = Mapping[str, tuple[int, ...]]
ASSUMED_LENGTHS = (16, 32, 64, 256)
"""Sizes of dynamic axes: the first as for torch models, or the next on which the graph runs."""
OPAQUE = frozenset({"LSTM", "DynamicQuantizeLSTM", "GRU", "RNN", "Einsum", "If", "Loop", "Scan"})
"""Operators with arithmetic that shapes alone do not tell."""


def graph_size(path: Path) -> ModelSize:
    """Multiply-accumulates per row, 0 if they cannot be told, and parameters: the constants that are not indices."""
    import onnx

    graph = onnx.load(path)
    types = onnx.TensorProto
    weights = {types.FLOAT, types.FLOAT16, types.BFLOAT16, types.DOUBLE, types.INT8, types.UINT8}
    parameters = sum(math.prod(item.dims) for item in graph.graph.initializer if item.data_type in weights)
    return ModelSize(_macs_of(path).all, parameters)


def quantized_share(path: Path) -> float | None:
    """Share (0..1) of the multiply-accumulates that are made of 8-bit weights; `None` where they cannot be told."""
    macs = _macs_of(path)
    return macs.quantized / macs.all if macs.all else None


class _Macs(NamedTuple):
    """Multiply-accumulates per row; none: they cannot be told."""

    all: int = 0
    quantized: int = 0


def _macs_of(path: Path) -> _Macs:
    import onnx

    counted = (_macs(onnx.load(path), length) for length in ASSUMED_LENGTHS)
    return next((macs for macs in counted if macs.all), _Macs())


def _macs(model: ModelProto, length: int) -> _Macs:
    """Of a single row whose dynamic axes are so long; the model is changed."""
    graph = model.graph
    if model.functions or any(node.op_type in OPAQUE for node in graph.node):
        return _Macs()
    for value in graph.input:
        for position, axis in enumerate(value.type.tensor_type.shape.dim):
            axis.dim_value = axis.dim_value or (length if position else 1)
    _forget_shapes(graph)
    try:
        folded = _folded(model).graph
    except Exception:  # the runtime's errors share no base class; a graph may not run on the assumed length
        return _Macs()
    shapes = _shapes(folded)
    dequantized = {name for node in folded.node if node.op_type == "DequantizeLinear" for name in node.output}
    counted = [node for node in folded.node if node.op_type in COUNTED]
    try:
        macs = [COUNTED[node.op_type](node, shapes) for node in counted]
    except KeyError:
        return _Macs()
    whole = (node.op_type in WHOLE or node.input[1] in dequantized for node in counted)
    return _Macs(sum(macs), sum(compress(macs, whole)))


def _folded(model: ModelProto) -> ModelProto:
    """With what is constant worked out, among it sizes that exporters compute, and all shapes inferred from that."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with TemporaryDirectory(prefix="leanserve-size-") as folder:
        options.optimized_model_filepath = str(Path(folder) / "folded.onnx")
        onnx_session(model.SerializeToString(), options)
        return onnx.shape_inference.infer_shapes(onnx.load(options.optimized_model_filepath), data_prop=True)


def _forget_shapes(graph: GraphProto) -> None:
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")


def _shapes(graph: GraphProto) -> Shapes:
    """The shapes that are wholly known, of constants too."""
    known: dict[str, tuple[int, ...]] = {item.name: tuple(item.dims) for item in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        tensor = value.type.tensor_type
        sizes = tuple(axis.dim_value for axis in tensor.shape.dim)
        if tensor.HasField("shape") and 0 not in sizes:
            known[value.name] = sizes
    return known


def _of_conv(node: NodeProto, shapes: Shapes) -> int:
    """Every output value is a sum over the weights of its channel."""
    return math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])


def _of_transposed_conv(node: NodeProto, shapes: Shapes) -> int:
    """Every input value is spread over the weights of its channel."""
    return math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])


def _of_gemm(node: NodeProto, shapes: Shapes) -> int:
    transposed = any(item.name == "transA" and item.i for item in node.attribute)
    return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if transposed else 1]


def _of_matmul(node: NodeProto, shapes: Shapes) -> int:
    return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]


WHOLE = frozenset({"ConvInteger", "MatMulInteger"})
"""Operators on whole numbers."""
COUNTED: Mapping[str, Callable[[NodeProto, Shapes], int]] = {
    "Conv": _of_conv,
    "ConvInteger": _of_conv,
    "ConvTranspose": _of_transposed_conv,
    "Gemm": _of_gemm,
    "MatMul": _of_matmul,
    "MatMulInteger": _of_matmul,
}
