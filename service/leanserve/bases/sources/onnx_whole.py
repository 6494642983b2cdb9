"""Gives a graph without an axis of rows one, so that it can be served a row at a time.

Streaming models take their state beside the input, with layers or directions on its first axis, and a sampling rate as
a single value; recognisers give time first. What such a graph takes at once is one row here: every input loses the axis
of rows, which has size 1, as it comes in, and every output gets one as it leaves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from leanserve.bases.sources.onnx_reading import nodes_of, opset_of

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto

LoneAxes = Literal["named", "unknown"]
"""Which axes are a batch that has one row: those that are named so, or of inputs with fixed sizes too all that are
not known."""
BATCH = frozenset({"b", "bs", "n", "batch", "batchsize", "batch_size", "num_batch", "rows"})
AXIS = "leanserve_axis_of_rows"
AXES_AS_INPUT = 13
"""The opset from which on `Squeeze` and `Unsqueeze` take their axes as an input."""


def sizes_of_whole(value: ValueInfoProto, lone: LoneAxes) -> tuple[int | None, ...]:
    """The sizes of a row that is all of an input; `None` where any is taken."""
    axes = value.type.tensor_type.shape.dim
    partly = any(axis.dim_value > 0 for axis in axes)

    def size(position: int) -> int | None:
        axis = axes[position]
        if axis.dim_value > 0:
            return int(axis.dim_value)
        if axis.dim_param.casefold() in BATCH:
            return 1
        nameless = not axis.dim_param
        return 1 if (nameless and position == 0) or (lone == "unknown" and partly) else None

    return tuple(map(size, range(len(axes))))


def add_axis_of_rows(model: ModelProto) -> None:
    """Put an axis of one row in front of every input and output; the model is changed."""
    from onnx import helper, numpy_helper

    graph = model.graph
    ends = [(item, f"{item.name}_of_row") for item in (*graph.input, *graph.output)]
    _rename(graph, {item.name: inner for item, inner in ends})
    as_input = opset_of(model) >= AXES_AS_INPUT
    if as_input:
        graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.int64), AXIS))

    def node(kind: str, source: str, target: str) -> NodeProto:
        name = f"{target}_{kind}"
        if as_input:
            return helper.make_node(kind, [source, AXIS], [target], name)
        return helper.make_node(kind, [source], [target], name, axes=[0])

    for item, inner in ends[: len(graph.input)]:
        graph.node.insert(0, node("Squeeze", item.name, inner))
    for item, inner in ends[len(graph.input) :]:
        graph.node.append(node("Unsqueeze", inner, item.name))
    for value in graph.input:
        _widen(value)
    for value in graph.output:
        if value.type.tensor_type.HasField("shape"):
            value.type.tensor_type.ClearField("shape")


def _widen(value: ValueInfoProto) -> None:
    shape = value.type.tensor_type.shape
    axes = [type(axis).FromString(axis.SerializeToString()) for axis in shape.dim]
    del shape.dim[:]
    shape.dim.add().dim_value = 1
    shape.dim.extend(axes)


def _rename(graph: GraphProto, names: dict[str, str]) -> None:
    """Let every node, those of branches and loops too, read and write values under their new names."""
    for node in nodes_of(graph):
        for fields in (node.input, node.output):
            for index, name in enumerate(fields):
                fields[index] = names.get(name, name)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                for value in inner.output:
                    value.name = names.get(value.name, value.name)
    for value in graph.value_info:
        value.name = names.get(value.name, value.name)
    for weight in graph.initializer:
        weight.name = names.get(weight.name, weight.name)
