"""By which operators the outputs of an ONNX graph end: a softmax at the end says that they are probabilities.

Exporters put casts and reshapes behind it, and converters of classic models end in operators of their own that hold the
softmax as an attribute. Whether rows really sum up to 1 is checked by a run (`bases.meanings.proven`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from leanserve.bases.meanings import LastOperator

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

OPERATORS: Final[Mapping[str, LastOperator]] = {"Softmax": "softmax", "LogSoftmax": "log_softmax", "Sigmoid": "sigmoid"}
UNCHANGING = frozenset(
    {
        *("Cast", "CastLike", "DequantizeLinear", "Dropout", "Flatten", "Identity", "Normalizer", "QuantizeLinear"),
        *("Reshape", "Squeeze", "Transpose", "Unsqueeze"),
    }
)
"""Operators that hand the numbers of their first input on: to `Normalizer`, probabilities sum up to 1 already."""
POST_TRANSFORM: Final[Mapping[bytes, LastOperator]] = {b"SOFTMAX": "softmax"}
"""What classifiers of `ai.onnx.ml` do to their scores at the end."""


def last_nodes(graph: GraphProto) -> list[LastOperator | None]:
    """Per output, the operator by which it ends, where that is one that tells what the output means."""
    made_by = {name: node for node in graph.node for name in node.output}
    return [_operator(item.name, made_by) for item in graph.output]


def _operator(name: str, made_by: Mapping[str, NodeProto]) -> LastOperator | None:
    node = made_by.get(name)
    while node is not None and node.op_type in UNCHANGING:
        node = made_by.get(node.input[0])
    if node is None:
        return None
    if node.domain == "ai.onnx.ml":
        transforms = (item.s for item in node.attribute if item.name == "post_transform")
        return next((POST_TRANSFORM.get(transform) for transform in transforms), None)
    return OPERATORS.get(node.op_type)
