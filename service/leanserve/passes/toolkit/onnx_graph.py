"""A float ONNX graph as the quantizing passes see it: fused, typed, its nodes named, its layers known."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from leanserve.contracts import Array, Model
from leanserve.errors import PassFailed
from leanserve.passes.toolkit.lowering import as_onnx
from leanserve.runtime.formats.onnx_session import onnx_session

LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
QUANTIZERS = ("_scale", "_zero_point", "_quantized", "_QuantizeLinear", "_DequantizeLinear", "_output_quantized")
"""How the names end that quantizers give."""
ASSUMED_LENGTH = 16
"""Size of a dynamic axis when arithmetic is counted."""
MICROSOFT = "com.microsoft"
"""The domain of onnxruntime's own operators."""
PLAIN = {"transA": 0, "alpha": 1.0, "beta": 1.0}
"""Attributes of a Gemm that does nothing but multiply and add a bias, whether its weights are transposed or not."""


def is_plain(node: onnx.NodeProto) -> bool:
    """Whether the layer multiplies its input by its weights and does nothing else but add a bias."""
    return all(helper.get_attribute_value(item) == PLAIN[item.name] for item in node.attribute if item.name in PLAIN)


def node_giving(name: str, operator: str, inputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    """A node whose only output has its name."""
    return helper.make_node(operator, list(inputs), [name], name=name, **attributes)


def replace_nodes(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], added: Iterable[onnx.TensorProto]) -> None:
    """Give a graph these nodes, in an order in which they can run, and constants; drop those that nothing reads."""
    graph = model.graph
    del graph.node[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in _reads(node)} | {item.name for item in graph.output}
    kept = [item for item in graph.initializer if item.name in read]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *added])
    foreign = any(node.domain == MICROSOFT for node in nodes)
    if foreign and all(item.domain != MICROSOFT for item in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node takes, and what the graphs of its branches or of its body take from outside."""
    yield from node.input
    for inner in (attribute.g for attribute in node.attribute if attribute.HasField("g")):
        yield from (name for part in inner.node for name in _reads(part))
        yield from (item.name for item in inner.output)


def fused_graph(model: Model, scratch: Path) -> Graph:
    """The model's graph with constants folded, layers fused and types inferred.

    This comes before quantizing: what is fused afterwards has been calibrated apart.

    Raises:
        PassFailed: a torch model cannot be exported.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(scratch / "fused.onnx")
    path = as_onnx(model, scratch / "float.onnx").path
    onnx_session(str(path), options)
    fused = onnx.shape_inference.infer_shapes(onnx.load(scratch / "fused.onnx"))
    for position, node in enumerate(fused.graph.node):
        node.name = node.name or f"{node.op_type}_fused_{position}"
    _leave_names(fused.graph)
    _pool_by_average(fused.graph)
    _part_biases(fused.graph)
    _forget_constants(fused.graph)
    return Graph(fused)


def _leave_names(graph: onnx.GraphProto) -> None:
    """Call tensors inside the graph otherwise that are called as quantizers call what they add: they ask nobody.

    Those of graphs in branches and loops keep their names, for no quantizer looks into these.
    """
    ends = {item.name for item in (*graph.input, *graph.output)}
    inner = {name for node in graph.node for name in node.output} | {item.name for item in graph.initializer}
    named = [name for name in sorted(inner - ends) if name.endswith(QUANTIZERS)]
    if not named or any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return
    others = {name: f"{name}_of_model" for name in named}
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [others.get(name, name) for name in names]
    for item in (*graph.initializer, *graph.value_info):
        item.name = others.get(item.name, item.name)


def _forget_constants(graph: onnx.GraphProto) -> None:
    """Drop the shapes noted for constants: quantizers transpose weights in place and the note would contradict them."""
    constants = {item.name for item in graph.initializer}
    kept = [item for item in graph.value_info if item.name not in constants]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _part_biases(graph: onnx.GraphProto) -> None:
    """Give every layer a bias of its own, as a vector.

    Quantizers copy one that several layers share to a name that may be taken, and fail on one that is a matrix of one
    row, as exporters of classic networks write it.
    """
    constants = {item.name: item for item in graph.initializer}
    readers = Counter(name for node in graph.node for name in node.input)
    taken = {name for node in graph.node for name in (*node.input, *node.output)} | constants.keys()
    for position, node in enumerate(graph.node):
        bias = constants.get(node.input[2]) if node.op_type in {"Conv", "Gemm"} and len(node.input) > 2 else None
        if bias is None or (len(bias.dims) == 1 and readers[bias.name] == 1):
            continue
        array = onnx.numpy_helper.to_array(bias)
        if array.ndim > 1 and array.shape[:-1] != (1,) * (array.ndim - 1):
            continue
        name = next(free for copy in count(position) if (free := f"bias_{copy}") not in taken)
        taken.add(name)
        graph.initializer.append(onnx.numpy_helper.from_array(array.reshape(-1), name))
        node.input[2] = name


def _pool_by_average(graph: onnx.GraphProto) -> None:
    """Write means over whole images as global average pooling, which has an int8 kernel where ReduceMean has none."""
    integers = [item for item in graph.initializer if item.data_type == onnx.TensorProto.INT64]
    axes = {item.name: onnx.numpy_helper.to_array(item) for item in integers}
    ranks = {item.name: len(item.type.tensor_type.shape.dim) for item in graph.value_info}
    for node in graph.node:
        if node.op_type != "ReduceMean" or len(node.input) != 2 or ranks.get(node.input[0]) != 4:
            continue
        keeps_axes = all(attribute.i for attribute in node.attribute if attribute.name == "keepdims")
        if keeps_axes and sorted(axes.get(node.input[1], np.zeros(0)) % 4) == [2, 3]:
            node.op_type = "GlobalAveragePool"
            del node.input[1:], node.attribute[:]


@dataclass(frozen=True)
class Graph:
    """A fused graph. Its *layers* are the convolutions and matrix products with constant weights."""

    model: onnx.ModelProto

    @property
    def nodes(self) -> Sequence[onnx.NodeProto]:
        nodes: Sequence[onnx.NodeProto] = self.model.graph.node
        return nodes

    @cached_property
    def constants(self) -> Mapping[str, onnx.TensorProto]:
        return {item.name: item for item in self.model.graph.initializer}

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the float32 tensors that are not constant; 0 marks a dynamic axis."""
        graph = self.model.graph
        described = [*graph.value_info, *graph.input, *graph.output]
        return {
            item.name: tuple(axis.dim_value for axis in item.type.tensor_type.shape.dim)
            for item in described
            if item.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        }

    @cached_property
    def layers(self) -> tuple[onnx.NodeProto, ...]:
        return tuple(node for node in self.nodes if node.op_type in LAYERS and self._has_weights(node))

    @cached_property
    def tables(self) -> tuple[onnx.NodeProto, ...]:
        """Look-ups of rows in constant matrices of floats: embeddings."""
        found = (node for node in self.nodes if node.op_type == "Gather" and node.input[0] in self.constants)
        types = onnx.TensorProto
        return tuple(
            node
            for node in found
            if self.constants[node.input[0]].data_type == types.FLOAT
            and len(self.constants[node.input[0]].dims) == 2
            and not any(item.name == "axis" and item.i for item in node.attribute)
        )

    def kernel(self, layer: onnx.NodeProto) -> Array:
        """The weight of a matrix product as [outputs, inputs]."""
        weight = onnx.numpy_helper.to_array(self.constants[layer.input[1]])
        turned = any(item.name == "transB" and item.i for item in layer.attribute)
        return weight if turned else weight.T

    @cached_property
    def recurrent(self) -> tuple[onnx.NodeProto, ...]:
        """LSTMs with constant weights, in the layout that quantizers know: time first."""
        found = (node for node in self.nodes if node.op_type == "LSTM" and {*node.input[1:3]} <= self.constants.keys())
        return tuple(node for node in found if not any(item.name == "layout" and item.i for item in node.attribute))

    def _has_weights(self, node: onnx.NodeProto) -> bool:
        weights = self.constants.get(node.input[1])
        if weights is None or node.input[0] not in self.shapes:
            return False
        return node.op_type != "MatMul" or len(weights.dims) == 2  # kernels know no stack of int8 matrices

    def macs(self, layer: onnx.NodeProto) -> int:
        """Multiply-accumulates per row of one layer."""
        weights = math.prod(int(size) for size in self.constants[layer.input[1]].dims)
        row = self.shapes.get(layer.output[0], ())[1:]
        places = row[1:] if layer.op_type == "Conv" else row[:-1]
        return weights * math.prod(size or ASSUMED_LENGTH for size in places)

    def matching(self, globs: Sequence[str]) -> frozenset[str]:
        """Names of the nodes whose name or operator type matches one of the globs.

        Raises:
            PassFailed: a glob matches nothing.
        """
        found: set[str] = set()
        for glob in globs:
            names = {
                node.name for node in self.nodes if fnmatchcase(node.name, glob) or fnmatchcase(node.op_type, glob)
            }
            if not names:
                layers = ", ".join(node.name for node in self.layers)
                raise PassFailed(f"keep_float: '{glob}' matches no node and no operator type; the layers are {layers}")
            found |= names
        return frozenset(found)
