"""Linear layers in 8 bits with one scale per vector of activations: per row, in a transformer per token.

onnxruntime's own dynamic quantization takes one scale for the whole tensor, so that the largest value of anybody in the
batch decides the steps of all others. The graph written here finds a scale per vector instead, which costs some passes
over the activations more than the fused kernel, and answers a little better. A vector that holds NaN or infinity spoils
its own row alone.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
from onnx import numpy_helper

from leanserve.contracts import Array
from leanserve.passes.toolkit.int8_graph import Bits, Nodes, Weights
from leanserve.passes.toolkit.onnx_graph import MICROSOFT, Graph, node_giving, replace_nodes

CENTRE, STEPS = 128, 127
"""Activations are unsigned, which x86 multiplies fastest: this number stands for 0, and so many steps lie above it."""
LARGEST_WEIGHT = {8: 127, 7: 64}
AXES_ARE_INPUTS = 18
"""The opset from which on reductions take their axes as an input."""


def quantized_by_row(graph: Graph, chosen: Nodes, weights: Weights, bits: Bits) -> onnx.ModelProto:
    """The graph with int8 weights in the chosen nodes, which are plain, and their inputs quantized vector by vector."""
    model = copy.deepcopy(graph.model)
    names = {node.name for node in chosen}
    rewriter = _Rewriter(graph, weights, bits, _raw(graph, names))
    nodes = [made for node in model.graph.node for made in (rewriter.replace(node) if node.name in names else [node])]
    replace_nodes(model, nodes, rewriter.constants.values())
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
        product = node_giving(name, "MatMulIntegerToFloat", [f"{vectors}_int8", *weight], domain=MICROSOFT)
        chain = [product, node_giving(f"{name}_scaled", "Mul", [product.output[0], f"{vectors}_scale"])]
        if bias := [item for item in node.input[2:] if item]:
            chain.append(node_giving(f"{name}_biased", "Add", [chain[-1].output[0], *bias]))
        if len(self.graph.shapes[source]) != 2:
            shape = self._shape_of_output(source, name, kernel.shape[1])
            chain += [*shape, node_giving(f"{name}_shaped", "Reshape", [chain[-1].output[0], shape[-1].output[0]])]
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
            node_giving(f"{name}_absolute", "Abs", [matrix]),
            *self._largest(name, last, "as NaN" if source in self.raw else "ignored"),
            node_giving(f"{name}_scale", "Mul", [f"{name}_largest", step]),
            node_giving(f"{name}_scales", "Squeeze", [f"{name}_scale", last]),
            node_giving(f"{name}_count", "Shape", [f"{name}_scales"]),
            node_giving(f"{name}_centres", "Expand", [centre, f"{name}_count"]),
            node_giving(f"{name}_int8", "QuantizeLinear", [matrix, f"{name}_scales", f"{name}_centres"], axis=0),
        ]

    def _flat(self, source: str, name: str, width: int) -> onnx.NodeProto:
        shape = self._constant(f"matrix_{width}", np.array([-1, width], np.int64))
        return node_giving(f"{name}_matrix", "Reshape", [source, shape])

    def _largest(self, name: str, axis: str, nan: Literal["as NaN", "ignored"]) -> list[onnx.NodeProto]:
        """The largest absolute value of each vector, in which the runtime overlooks NaN; a sum does not."""
        opset = next(item.version for item in self.graph.model.opset_import if item.domain in {"", "ai.onnx"})
        values, largest = f"{name}_absolute", f"{name}_largest"
        seen = largest if nan == "ignored" else f"{name}_seen"
        if opset >= AXES_ARE_INPUTS:
            top = node_giving(seen, "ReduceMax", [values, axis], keepdims=1)
        else:
            top = node_giving(seen, "ReduceMax", [values], axes=[-1], keepdims=1)
        if nan == "ignored":
            return [top]
        return [
            top,
            node_giving(f"{name}_sum", "ReduceSum", [values, axis], keepdims=1),
            node_giving(f"{name}_nothing", "Mul", [f"{name}_sum", self._constant("zero", np.float32(0))]),
            node_giving(largest, "Add", [seen, f"{name}_nothing"]),
        ]

    def _shape_of_output(self, source: str, name: str, width: int) -> list[onnx.NodeProto]:
        """The shape of the layer's output: that of its input up to the last axis, which has another size."""
        first = self._constant("first_axis", np.array([0], np.int64))
        last = self._constant("last_axis", np.array([-1], np.int64))
        size = self._constant(f"width_{width}", np.array([width], np.int64))
        return [
            node_giving(f"{name}_whole_shape", "Shape", [source]),
            node_giving(f"{name}_places", "Slice", [f"{name}_whole_shape", first, last]),
            node_giving(f"{name}_shape", "Concat", [f"{name}_places", size], axis=0),
        ]

    def _weight(self, node: onnx.NodeProto) -> tuple[Array, Array]:
        """Kernel int8 [inputs, outputs] and its float steps, one per output or a single one."""
        kernel = self.graph.kernel(node).T
        largest = np.abs(kernel).max(axis=0 if self.weights == "per_channel" else None)
        steps = np.asarray(np.where(largest > 0, largest, 1) / LARGEST_WEIGHT[self.bits], np.float32)
        return np.rint(kernel / steps).astype(np.int8), steps

    def _constant(self, name: str, value: Any) -> str:
        """The name of a constant of the graph; one of a name is stored once."""
        name = f"row_scales.{name}"
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name
