"""Linear layers in 8 bits with one scale per vector of activations: per row, in a transformer per token.

onnxruntime's own dynamic quantization takes one scale for the whole tensor, so that the largest value of anybody in the
batch decides the steps of all others. The graph written here finds a scale per vector instead, which costs some passes
over the activations more than the fused kernel, and answers a little better. A vector that holds NaN or infinity spoils
its own row alone.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

from leanserve.contracts import Array
from leanserve.passes.toolkit.int8_graph import Bits, Nodes, Weights
from leanserve.passes.toolkit.onnx_graph import Graph

CENTRE, STEPS = 128, 127
"""Activations are unsigned, which x86 multiplies fastest: this number stands for 0, and so many steps lie above it."""
LARGEST_WEIGHT = {8: 127, 7: 64}
AXES_ARE_INPUTS = 18
"""The opset from which on reductions take their axes as an input."""
MICROSOFT = "com.microsoft"
PLAIN = {"transA": 0, "alpha": 1.0, "beta": 1.0}
"""Attributes of a Gemm that does nothing but multiply and add a bias, whether its weights are transposed or not."""


def is_plain(node: onnx.NodeProto) -> bool:
    """Whether the layer multiplies its input by its weights and does nothing else but add a bias."""
    return all(helper.get_attribute_value(item) == PLAIN[item.name] for item in node.attribute if item.name in PLAIN)


def quantized_by_row(graph: Graph, chosen: Nodes, weights: Weights, bits: Bits) -> onnx.ModelProto:
    """The graph with int8 weights in the chosen nodes, which are plain, and their inputs quantized vector by vector."""
    model = copy.deepcopy(graph.model)
    names = {node.name for node in chosen}
    rewriter = _Rewriter(graph, weights, bits, _raw(graph, names))
    nodes = [made for node in model.graph.node for made in (rewriter.replace(node) if node.name in names else [node])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input} | {item.name for item in model.graph.output}
    kept = [item for item in model.graph.initializer if item.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, *rewriter.constants.values()])
    if all(item.domain != MICROSOFT for item in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return model


def _raw(graph: Graph, chosen: Collection[str]) -> frozenset[str]:
    """The tensors that a float input of the model reaches by a way on which no chosen layer lies."""
    raw = {item.name for item in graph.model.graph.input if item.name in graph.shapes}
    for node in graph.nodes:
        if node.name not in chosen and raw & set(node.input):
            raw |= set(node.output)
    return frozenset(raw)


@dataclass
class _Rewriter:
    """Writes layers anew one by one; what is quantized for one serves all that read the same tensor."""

    graph: Graph
    weights: Weights
    bits: Bits
    raw: Collection[str]
    """Tensors of which single numbers may be NaN; what a quantized layer gives is NaN all together or not at all."""
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    _vectors: dict[str, str] = field(default_factory=dict)
    """From a tensor to the beginning of the names of its quantized vectors and their scales."""

    def replace(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Nodes that compute nearly what `node` does, and give it under the same name."""
        source, name = node.input[0], node.name
        kernel, steps = self._weight(node)
        nodes = [] if source in self._vectors else self._quantize(source, len(kernel))
        vectors = self._vectors[source]
        one, centre = self._constant("one", np.float32(1)), self._constant("centre", np.uint8(CENTRE))
        weight = self._constant(f"{name}_int8", kernel), one, self._constant(f"{name}_steps", steps), centre
        product = _node("MatMulIntegerToFloat", name, [f"{vectors}_int8", *weight], domain=MICROSOFT)
        chain = [product, _node("Mul", f"{name}_scaled", [product.output[0], f"{vectors}_scale"])]
        if bias := [item for item in node.input[2:] if item]:
            chain.append(_node("Add", f"{name}_biased", [chain[-1].output[0], *bias]))
        if len(self.graph.shapes[source]) != 2:
            shape = self._shape_of_output(source, name, kernel.shape[1])
            chain += [*shape, _node("Reshape", f"{name}_shaped", [chain[-1].output[0], shape[-1].output[0]])]
        chain[-1].output[0] = node.output[0]
        return [*nodes, *chain]

    def _quantize(self, source: str, width: int) -> list[onnx.NodeProto]:
        """The tensor as a matrix of vectors in 8 bits, and the scale of each: its largest absolute value in `STEPS`."""
        name = self._vectors[source] = f"{source}_vectors"
        flat = [] if len(self.graph.shapes[source]) == 2 else [self._flat(source, name, width)]
        matrix = flat[0].output[0] if flat else source
        last = self._constant("last_axis", np.array([-1], np.int64))
        step = self._constant("step", np.float32(1 / STEPS))
        centre = self._constant("centre", np.uint8(CENTRE))
        return [
            *flat,
            _node("Abs", f"{name}_absolute", [matrix]),
            *self._largest(name, last, "as NaN" if source in self.raw else "ignored"),
            _node("Mul", f"{name}_scale", [f"{name}_largest", step]),
            _node("Squeeze", f"{name}_scales", [f"{name}_scale", last]),
            _node("Shape", f"{name}_count", [f"{name}_scales"]),
            _node("Expand", f"{name}_centres", [centre, f"{name}_count"]),
            _node("QuantizeLinear", f"{name}_int8", [matrix, f"{name}_scales", f"{name}_centres"], axis=0),
        ]

    def _flat(self, source: str, name: str, width: int) -> onnx.NodeProto:
        shape = self._constant(f"matrix_{width}", np.array([-1, width], np.int64))
        return _node("Reshape", f"{name}_matrix", [source, shape])

    def _largest(self, name: str, axis: str, nan: Literal["as NaN", "ignored"]) -> list[onnx.NodeProto]:
        """The largest absolute value of each vector, in which the runtime overlooks NaN; a sum does not."""
        opset = next(item.version for item in self.graph.model.opset_import if item.domain in {"", "ai.onnx"})
        values, largest = f"{name}_absolute", f"{name}_largest"
        seen = largest if nan == "ignored" else f"{name}_seen"
        if opset >= AXES_ARE_INPUTS:
            top = _node("ReduceMax", seen, [values, axis], keepdims=1)
        else:
            top = _node("ReduceMax", seen, [values], axes=[-1], keepdims=1)
        if nan == "ignored":
            return [top]
        return [
            top,
            _node("ReduceSum", f"{name}_sum", [values, axis], keepdims=1),
            _node("Mul", f"{name}_nothing", [f"{name}_sum", self._constant("zero", np.float32(0))]),
            _node("Add", largest, [seen, f"{name}_nothing"]),
        ]

    def _shape_of_output(self, source: str, name: str, width: int) -> list[onnx.NodeProto]:
        """The shape of the layer's output: that of its input up to the last axis, which has another size."""
        first = self._constant("first_axis", np.array([0], np.int64))
        last = self._constant("last_axis", np.array([-1], np.int64))
        size = self._constant(f"width_{width}", np.array([width], np.int64))
        return [
            _node("Shape", f"{name}_whole_shape", [source]),
            _node("Slice", f"{name}_places", [f"{name}_whole_shape", first, last]),
            _node("Concat", f"{name}_shape", [f"{name}_places", size], axis=0),
        ]

    def _weight(self, node: onnx.NodeProto) -> tuple[Array, Array]:
        """Kernel int8 [inputs, outputs] and its float steps, one per output or a single one."""
        kernel = numpy_helper.to_array(self.graph.constants[node.input[1]])
        if any(item.name == "transB" and item.i for item in node.attribute):
            kernel = kernel.T
        largest = np.abs(kernel).max(axis=0 if self.weights == "per_channel" else None)
        steps = np.asarray(np.where(largest > 0, largest, 1) / LARGEST_WEIGHT[self.bits], np.float32)
        return np.rint(kernel / steps).astype(np.int8), steps

    def _constant(self, name: str, value: Any) -> str:
        """The name of a constant of the graph; one of a name is stored once."""
        name = f"row_scales.{name}"
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name


def _node(operator: str, name: str, inputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    """A node whose only output has its name."""
    return helper.make_node(operator, list(inputs), [name], name=name, **attributes)
