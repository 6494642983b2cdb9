"""Weights of an ONNX graph stored in 16 or 8 bits: each is converted to float32 before what reads it.

Runtimes do that once, when they load the graph, and compute as before.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from leanserve.runtime.formats.torch_storage import narrowed

TYPES: Final = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16, "fp8": TensorProto.FLOAT8E4M3FN}


def weights_of(model: onnx.ModelProto) -> list[str]:
    """The names of the constants that are matrices, kernels or tables in float32."""
    return [item.name for item in model.graph.initializer if item.data_type == TensorProto.FLOAT and len(item.dims) > 1]


def narrow_graph(
    model: onnx.ModelProto, storage: str, keep: Collection[str] = (), *, only_exact: bool = False
) -> list[str]:
    """Store the weights of a graph in `storage` but for those in `keep`; the names of those that are stored so now.

    `only_exact` leaves out what would be rounded by it.
    """
    graph = model.graph
    chosen = set(weights_of(model)) - set(keep)
    written: list[TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    for item in graph.initializer:
        found = _stored(item, storage, only_exact=only_exact) if item.name in chosen else None
        if found is None:
            written.append(item)
        else:
            written += found[0]
            nodes += found[1]
    before = list(graph.node)
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(written)
    graph.node.extend([*nodes, *before])
    return [node.name.removesuffix("/Cast") for node in nodes if node.op_type == "Cast"]


def overflowing(model: onnx.ModelProto, storage: str, keep: Collection[str] = ()) -> list[str]:
    """The weights with values that are finite, and beyond the range of `storage`."""
    chosen = set(weights_of(model)) - set(keep)
    values = ((item.name, _values(item)) for item in model.graph.initializer if item.name in chosen)
    return [name for name, wide in values if bool((narrowed(wide, storage)[0].float().isinf() & wide.isfinite()).any())]


def _values(item: TensorProto) -> torch.Tensor:
    return torch.from_numpy(numpy_helper.to_array(item).copy())


def _stored(
    item: TensorProto, storage: str, *, only_exact: bool
) -> tuple[list[TensorProto], list[onnx.NodeProto]] | None:
    """A weight's constants, and the nodes that make float32 of them."""
    values = _values(item)
    narrow, scale = narrowed(values, storage)
    if only_exact and not torch.equal(narrow.float() * scale, values):
        return None
    name = str(item.name)
    raw: Any = narrow.contiguous().view(torch.uint8).numpy().tobytes()
    constants = [helper.make_tensor(f"{name}.stored", TYPES[storage], list(item.dims), raw, raw=True)]
    wide = name if scale == 1.0 else f"{name}.unscaled"
    nodes = [helper.make_node("Cast", [f"{name}.stored"], [wide], f"{name}/Cast", to=TensorProto.FLOAT)]
    if scale != 1.0:
        constants.append(helper.make_tensor(f"{name}.scale", TensorProto.FLOAT, [], [scale]))
        nodes.append(helper.make_node("Mul", [wide, f"{name}.scale"], [name], f"{name}/Mul"))
    return constants, nodes
