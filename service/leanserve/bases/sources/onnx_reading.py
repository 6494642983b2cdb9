"""Reads an ONNX file that somebody brought: whole, checked, with nothing in it that the runtime lacks.

ONNX holds a graph and tensors, no code; what could reach beyond the file is looked at here: tensors stored outside it
must lie beside it, and operators must be those that the runtime itself knows.

By which operators outputs end is read here, too: a softmax at the end says that they are probabilities. Exporters put
casts and reshapes behind it, and converters of classic models end in operators of their own that hold the softmax as an
attribute. Whether rows really sum up to 1 is checked by a run (`bases.meanings.proven`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from leanserve.bases.meanings import LastOperator
from leanserve.errors import ConfigError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")
"""Whose operators onnxruntime brings."""
LEAST_OPSET = 13
"""The first in which one scale per channel can be written down."""
LEAST_FORMAT = 4
NEWEST_FORMAT = 10
"""The version of the file format that every supported onnxruntime reads."""
LARGEST_BYTES = 2**31 - 1
"""A protobuf message cannot be larger, and artifacts are single files."""
MOST_AXES, LARGEST_WRITTEN, MOST_WRITTEN = 8, 4096, 32
"""Of a shape that stands in a graph; sizes in it that are worth a trial, and how many of them."""
SHOWN = 4
_PIECE = 2**18
ASSUMED_LOCALES = (b"", b"en_US", b"en_US.UTF-8")
LOCALE = "C.UTF-8"
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


def read_onnx(path: Path) -> ModelProto:
    """The model in a file, tensors from beside it folded in.

    Raises:
        ConfigError: missing, damaged, too large for one file, or not runnable here; the text says what to do.
    """
    import onnx

    model = _parsed(path)
    files = [path, *stored_outside(model, path)]
    size = sum(file.stat().st_size for file in files)
    if size > LARGEST_BYTES:
        raise ConfigError(
            f"base.onnx: {path} takes {size / 2**30:.1f} GiB with its tensors, a single ONNX file holds less than 2; "
            "bring the model as a torch module (python: or transformers:) instead"
        )
    # Up to version 3 of the format weights had to be inputs, too; files that say 3 and do otherwise run all the same.
    model.ir_version = max(model.ir_version, LEAST_FORMAT)
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
        onnx.checker.check_model(model)
    except Exception as error:  # the checker's own errors, and those of reading tensors
        raise ConfigError(f"base.onnx: {path} is damaged: {_first_line(error)}") from error
    _refuse_unknown_operators(model, path)
    _forget_impossible_sizes(model)
    _fold_case_everywhere(model)
    # The version of the format runs ahead of runtimes with every release of onnx; what graphs need is in their opset.
    model.ir_version = min(model.ir_version, NEWEST_FORMAT)
    return model


def _forget_impossible_sizes(model: ModelProto) -> None:
    """Some exporters write 0 or -1 for what they do not know."""
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            if axis.HasField("dim_value") and axis.dim_value <= 0:
                axis.Clear()


def _fold_case_everywhere(model: ModelProto) -> None:
    """Where no locale is said, onnxruntime asks for one that small machines do not have installed; the one that comes
    with the C library knows the same letters."""
    from onnx import helper

    for node in nodes_of(model.graph):
        if node.op_type == "StringNormalizer":
            others = [item for item in node.attribute if item.name != "locale" or item.s not in ASSUMED_LOCALES]
            if all(item.name != "locale" for item in others):
                del node.attribute[:]
                node.attribute.extend([*others, helper.make_attribute("locale", LOCALE)])


def files_of(path: Path) -> tuple[Path, ...]:
    """The file and those that hold its tensors.

    Most have all tensors in one: then it is not parsed, which would hold Python's lock for 0.3 s per 100 MB, beside a
    service that answers.

    Raises:
        ConfigError: one is missing.
    """
    if not path.is_file():
        raise ConfigError(f"base.onnx: there is no file {path}")
    return (path, *stored_outside(_parsed(path), path)) if _mentions(path, b"location") else (path,)


def _mentions(path: Path, word: bytes) -> bool:
    """Whether a file has these bytes; each tensor that is stored outside says `location`."""
    before = b""
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            if word in before + piece:
                return True
            before = piece[1 - len(word) :]
    return False


def stored_outside(model: ModelProto, path: Path) -> tuple[Path, ...]:
    """The files that hold tensors of a model as it was parsed, each once.

    Raises:
        ConfigError: one does not exist, or lies elsewhere than beside the model.
    """
    folder = path.parent.resolve()
    names = {entry.value for tensor in _tensors(model) for entry in tensor.external_data if entry.key == "location"}
    found = tuple((folder / name).resolve() for name in sorted(names))
    for file in found:
        if not file.is_relative_to(folder):
            raise ConfigError(f"base.onnx: {path} wants tensors from {file}; they must lie beside it")
        if not file.is_file():
            raise ConfigError(f"base.onnx: {path} has tensors in {file.name}, which is not beside it; copy it there")
    return found


def nodes_of(graph: GraphProto) -> Iterator[NodeProto]:
    """Every node, those of branches and loops included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from nodes_of(inner)


def written_sizes(graph: GraphProto) -> tuple[int, ...]:
    """Sizes that may stand in shapes: an exporter that traced a run may have left those of that run."""
    from onnx import TensorProto, numpy_helper

    short = (
        item for item in graph.initializer if item.data_type == TensorProto.INT64 and math.prod(item.dims) <= MOST_AXES
    )
    found = {size for item in short for size in numpy_helper.to_array(item).ravel().tolist()}
    return tuple(sorted(size for size in found if 1 < size <= LARGEST_WRITTEN))[:MOST_WRITTEN]


def _parsed(path: Path) -> ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise ConfigError(f"base.onnx: there is no file {path}")
    try:
        model: ModelProto = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ConfigError(f"base.onnx: {path} is not an ONNX file") from error
    if not model.graph.node:
        raise ConfigError(f"base.onnx: {path} is not an ONNX file, or one without any operator")
    return model


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    nodes = [*nodes_of(model.graph), *(node for function in model.functions for node in function.node)]
    graphs = [model.graph, *(inner for node in nodes for item in node.attribute for inner in (item.g, *item.graphs))]
    for graph in graphs:
        yield from graph.initializer
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)


def _refuse_unknown_operators(model: ModelProto, path: Path) -> None:
    defined = {(function.domain, function.name) for function in model.functions}
    inside = (node for function in model.functions for node in function.node)
    unknown = dict.fromkeys(
        f"{node.domain}::{node.op_type}"
        for node in (*nodes_of(model.graph), *inside)
        if node.domain not in DOMAINS and (node.domain, node.op_type) not in defined
    )
    if unknown:
        names = ", ".join(list(unknown)[:SHOWN]) + (f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else "")
        raise ConfigError(
            f"base.onnx: {path} uses operators that onnxruntime does not have ({names}); export it with those of "
            "ONNX alone"
        )


def opset_of(model: ModelProto) -> int:
    """The version of ONNX's own operators that it is written in."""
    return next((item.version for item in model.opset_import if item.domain in {"", "ai.onnx"}), LEAST_OPSET)


def modern(model: ModelProto, path: Path) -> ModelProto:
    """The model, converted to opset 13 if it is written in an older one.

    Raises:
        ConfigError: it cannot be converted.
    """
    from onnx import version_converter

    opset = opset_of(model)
    if opset >= LEAST_OPSET:
        return model
    try:
        converted: ModelProto = version_converter.convert_version(model, LEAST_OPSET)
    except Exception as error:  # the converter raises RuntimeError, AssertionError and others
        raise ConfigError(
            f"base.onnx: {path} is written in opset {opset} and cannot be converted to {LEAST_OPSET} "
            f"({_first_line(error)}); export it again with opset {LEAST_OPSET} or newer"
        ) from error
    return converted


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


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
