"""Embeddings in 8 bits with a scale per row, in operators of every ONNX runtime: look up, convert, multiply."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import numpy_helper

from leanserve.passes.toolkit.onnx_graph import node_giving, replace_nodes

STEPS = 127


def with_int8_tables(model: onnx.ModelProto, lookups: Collection[onnx.NodeProto]) -> onnx.ModelProto:
    """The graph, changed in place, with the constant tables of these look-ups in int8."""
    constants = {item.name: item for item in model.graph.initializer}
    names = {node.name for node in lookups}
    added: dict[str, onnx.TensorProto] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.name not in names:
            nodes.append(node)
            continue
        table = numpy_helper.to_array(constants[node.input[0]])
        largest = np.abs(table).max(1, keepdims=True)
        scales = (np.where(largest > 0, largest, 1) / STEPS).astype(np.float32)
        codes, steps = f"{node.input[0]}.int8", f"{node.input[0]}.steps"
        added[codes] = numpy_helper.from_array(np.rint(table / scales).astype(np.int8), codes)
        added[steps] = numpy_helper.from_array(scales, steps)
        product = node_giving(f"{node.name}.product", "Mul", [f"{node.name}.wide", f"{node.name}.step"])
        product.output[0] = node.output[0]
        nodes += [
            node_giving(f"{node.name}.int8", "Gather", [codes, node.input[1]]),
            node_giving(f"{node.name}.wide", "Cast", [f"{node.name}.int8"], to=onnx.TensorProto.FLOAT),
            node_giving(f"{node.name}.step", "Gather", [steps, node.input[1]]),
            product,
        ]
    replace_nodes(model, nodes, added.values())
    return model
