"""An ONNX graph whose weights are codes of 2 to 8 bits in groups, in onnxruntime's own operators for them.

`MatMulNBits` multiplies floats by such weights, `GatherBlockQuantized` looks rows up in such a table. There are kernels
for 2, 4 and 8 bits; weights of 3 bits are stored as such and spread to 4 when a session folds its constants.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from leanserve.contracts import Array
from leanserve.passes.toolkit.group_codes import Codes, Grouped, packed
from leanserve.passes.toolkit.onnx_graph import MICROSOFT, Graph, node_giving, replace_nodes

INTEGER_SUMS = 4
"""`accuracy_level` that lets the kernel round its inputs to 8 bits, group by group: the fastest one."""


@dataclass(frozen=True)
class GroupedLayer:
    """What takes the place of a layer: its weight in groups, and by what its input is multiplied before."""

    weight: Grouped
    inputs: int
    input_scales: Array | None = None


@dataclass
class GroupWriter:
    """Writes layers and tables anew; what several of them need stands in the graph once."""

    graph: Graph
    bits: int
    _constants: dict[str, onnx.TensorProto] = field(default_factory=dict)
    _scaled: dict[str, str] = field(default_factory=dict)

    def written(
        self, layers: Mapping[str, GroupedLayer], tables: Mapping[str, Grouped], table_bits: int
    ) -> onnx.ModelProto:
        """The graph with these nodes, by name, replaced; weights that nothing reads any more are dropped."""
        model = copy.deepcopy(self.graph.model)
        nodes: list[onnx.NodeProto] = []
        for node in model.graph.node:
            if node.name in layers:
                nodes += self._product(node, layers[node.name])
            elif node.name in tables:
                nodes.append(self._lookup(node, tables[node.name], table_bits))
            else:
                nodes.append(node)
        replace_nodes(model, nodes, self._constants.values())
        return model

    def _product(self, node: onnx.NodeProto, layer: GroupedLayer) -> list[onnx.NodeProto]:
        name, source = node.name, node.input[0]
        nodes: list[onnx.NodeProto] = []
        if layer.input_scales is not None:
            nodes += [] if source in self._scaled else [self._scaling(source, layer.input_scales)]
            source = self._scaled[source]
        outputs, _, size = layer.weight.codes.shape
        codes, made = self._codes(name, layer.weight.codes)
        kernel_bits = 4 if self.bits == 3 else self.bits
        inputs = [
            source,
            codes,
            self._constant(f"{name}.steps", layer.weight.steps.reshape(-1)),
            self._constant(f"{name}.zeros", packed(layer.weight.zeros, kernel_bits).reshape(-1)),
        ]
        about = {"K": layer.inputs, "N": outputs, "bits": kernel_bits, "block_size": size}
        product = node_giving(name, "MatMulNBits", inputs, domain=MICROSOFT, accuracy_level=INTEGER_SUMS, **about)
        nodes += [*made, product]
        if bias := [item for item in node.input[2:] if item]:
            nodes.append(node_giving(f"{name}.biased", "Add", [product.output[0], *bias]))
        nodes[-1].output[0] = node.output[0]
        return nodes

    def _scaling(self, source: str, scales: Array) -> onnx.NodeProto:
        self._scaled[source] = f"{source}.scaled"
        factors = self._constant(f"{source}.factors", (1 / scales).astype(np.float32))
        return node_giving(self._scaled[source], "Mul", [source, factors])

    def _lookup(self, node: onnx.NodeProto, table: Grouped, bits: int) -> onnx.NodeProto:
        rows, _, size = table.codes.shape
        inputs = [
            self._constant(f"{node.name}.codes", packed(table.codes.reshape(rows, -1), bits)),
            node.input[1],
            self._constant(f"{node.name}.steps", table.steps),
            self._constant(f"{node.name}.zeros", packed(table.zeros, bits)),
        ]
        about = {"gather_axis": 0, "quantize_axis": 1, "bits": bits, "block_size": size}
        lookup = node_giving(node.name, "GatherBlockQuantized", inputs, domain=MICROSOFT, **about)
        lookup.output[0] = node.output[0]
        return lookup

    def _codes(self, name: str, codes: Codes) -> tuple[str, Sequence[onnx.NodeProto]]:
        """The tensor of the packed codes, and the nodes that make it where it is not stored as the kernel takes it."""
        if self.bits != 3:
            return self._constant(f"{name}.codes", packed(codes, self.bits)), ()
        outputs, groups, size = codes.shape
        stored = self._constant(f"{name}.codes", packed(codes.reshape(outputs, groups, size // 8, 8), 3))
        made = self._spread(name, stored)
        shape = self._constant(f"shape.{outputs}.{groups}.{size}", np.array([outputs, groups, size // 2], np.int64))
        return f"{name}.nibbles", [*made, node_giving(f"{name}.nibbles", "Reshape", [f"{name}.bytes", shape])]

    def _spread(self, name: str, stored: str) -> list[onnx.NodeProto]:
        """Three bytes of eight codes each to four bytes of two: constant, so that a session does it once, at load."""
        places = self._constant("places", 256 ** np.arange(3, dtype=np.int64))
        eighths = self._constant("eighths", 8 ** np.arange(8, dtype=np.int64))
        eight, last = self._constant("eight", np.int64(8)), self._constant("last", np.array([-1], np.int64))
        pairs = self._constant("pairs", np.array([0, 0, 0, 4, 2], np.int64))
        nibble = self._constant("nibble", np.array([1, 16], np.int64))
        types = onnx.TensorProto
        return [
            node_giving(f"{name}.wide", "Cast", [stored], to=types.INT64),
            node_giving(f"{name}.placed", "Mul", [f"{name}.wide", places]),
            node_giving(f"{name}.words", "ReduceSum", [f"{name}.placed", last], keepdims=1),
            node_giving(f"{name}.shifted", "Div", [f"{name}.words", eighths]),
            node_giving(f"{name}.single", "Mod", [f"{name}.shifted", eight]),
            node_giving(f"{name}.paired", "Reshape", [f"{name}.single", pairs]),
            node_giving(f"{name}.weighed", "Mul", [f"{name}.paired", nibble]),
            node_giving(f"{name}.joined", "ReduceSum", [f"{name}.weighed", last], keepdims=0),
            node_giving(f"{name}.bytes", "Cast", [f"{name}.joined"], to=types.UINT8),
        ]

    def _constant(self, name: str, value: Any) -> str:
        name = f"groups.{name}"
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name
