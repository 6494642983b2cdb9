"""Makes a graph that somebody brought fit to be served: its first axis counts rows, its shapes are known.

Exporters often write a batch of one into the graph. Much of that can be undone: the axis gets a name, shapes that were
inferred from it are dropped and inferred anew, reshapes to a fixed number of rows copy the number from their input. No
rule is sure to be right, so nothing is believed until `onnx_trial` has run the result beside the original.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from leanserve.bases.description import Tensor
from leanserve.bases.inputs import image_tensor
from leanserve.config.base_section import BroughtBase, ImageInput
from leanserve.errors import ConfigError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, ValueInfoProto

ROWS = "rows"
DeclaredBase = Mapping[str, Tensor]


@dataclass(frozen=True)
class Prepared:
    """A graph with a dynamic first axis, what it takes, and the batch size that was fixed in the file, if any was."""

    model: ModelProto
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    fixed_rows: int | None


def prepared(model: ModelProto, declared: BroughtBase) -> Prepared:
    """Give the model a dynamic first axis and complete its shapes; the model is changed.

    Raises:
        ConfigError: an input is no tensor of numbers, has no axis of rows, or is not what the config declares.
    """
    graph = model.graph
    _keep_true_inputs(model)
    wishes = _wishes(declared, [item.name for item in graph.input])
    inputs = tuple(_settled(item, wishes) for item in graph.input)
    if declared.text is not None:
        _refuse_fixed_length(inputs)
    fixed = {item.type.tensor_type.shape.dim[0].dim_value for item in graph.input} - {0}
    if len(fixed) > 1:
        raise ConfigError(
            f"base.onnx: the inputs have different fixed first axes ({', '.join(map(str, sorted(fixed)))}); the first "
            "axis must count the rows. Export it again with a dynamic batch axis"
        )
    for value in graph.input:
        _name_axis(value)
    if fixed:
        _forget_rows(graph, next(iter(fixed)))
    outputs = tuple(item.name for item in graph.output)
    return Prepared(_inferred(model), inputs, outputs, next(iter(fixed), None))


def _keep_true_inputs(model: ModelProto) -> None:
    """Old files list their weights among the inputs."""
    graph = model.graph
    weights = {item.name for item in graph.initializer} | {item.values.name for item in graph.sparse_initializer}
    kept = [item for item in graph.input if item.name not in weights]
    del graph.input[:]
    graph.input.extend(kept)
    model.ir_version = max(model.ir_version, 8)  # from 4 on, weights need not be inputs
    if not kept:
        raise ConfigError("base.onnx: the model takes no input")


def _wishes(declared: BroughtBase, names: Sequence[str]) -> DeclaredBase:
    """What the config says of each input; the names are the graph's own."""
    if isinstance(declared.image, ImageInput):
        if len(names) != 1:
            raise ConfigError(f"base.image: the model takes {len(names)} inputs ({', '.join(names)}), not one image")
        return {names[0]: image_tensor(declared.image)}
    if declared.inputs is None:
        return {}
    if set(declared.inputs) != set(names):
        raise ConfigError(f"base.inputs: the model takes {', '.join(names)}, not {', '.join(declared.inputs)}")
    return {name: Tensor(name=name, dtype=item.dtype, shape=item.shape) for name, item in declared.inputs.items()}


def _settled(value: ValueInfoProto, wishes: DeclaredBase) -> Tensor:
    """One input: what the graph says of it, narrowed to what the config says; the graph is changed accordingly."""
    wish = wishes.get(value.name)
    dtype = _dtype(value)
    if wish is not None and wish.dtype != dtype:
        raise ConfigError(f"base: the config declares {wish.dtype} for the input '{value.name}', which takes {dtype}")
    shape = value.type.tensor_type.shape
    if not value.type.tensor_type.HasField("shape"):
        if wish is None:
            raise ConfigError(
                f"base.onnx: the file does not tell the shape of the input '{value.name}'; declare it in base.inputs"
            )
        for _ in range(1 + len(wish.shape)):
            shape.dim.add()
    if not shape.dim:
        raise ConfigError(f"base.onnx: the input '{value.name}' is a single value; the first axis must count the rows")
    sizes = tuple(axis.dim_value or None for axis in shape.dim[1:])
    if wish is None:
        return Tensor(name=value.name, dtype=dtype, shape=sizes)
    pairs = zip(sizes, wish.shape, strict=False)
    if len(wish.shape) != len(sizes) or any(size not in {None, asked} for size, asked in pairs):
        raise ConfigError(
            f"base: the config declares rows of {_shown(wish.shape)} for the input '{value.name}', which takes "
            f"{_shown(sizes)}"
        )
    for axis, size in zip(shape.dim[1:], wish.shape, strict=True):
        if size is not None:
            axis.dim_value = size
    return Tensor(name=value.name, dtype=dtype, shape=wish.shape)


def _dtype(value: ValueInfoProto) -> str:
    from onnx import TensorProto, helper

    if not value.type.HasField("tensor_type"):
        kind = value.type.WhichOneof("value")
        raise ConfigError(f"base.onnx: the input '{value.name}' is a {kind}, not a tensor")
    code = value.type.tensor_type.elem_type
    dtype = helper.tensor_dtype_to_np_dtype(code)
    if dtype.kind not in "biuf" or code == TensorProto.BFLOAT16:
        raise ConfigError(
            f"base.onnx: the input '{value.name}' takes {TensorProto.DataType.Name(code).lower()}, which clients "
            "cannot send; cast it inside the graph"
        )
    return str(dtype)


def _refuse_fixed_length(inputs: Sequence[Tensor]) -> None:
    for item in inputs:
        if item.shape != (None,):
            raise ConfigError(
                f"base.text: the input '{item.name}' takes rows of {_shown(item.shape)}; a model of texts takes any "
                "number of token ids. Export it with a dynamic second axis, or declare base.inputs"
            )


def _name_axis(value: ValueInfoProto) -> None:
    axis = value.type.tensor_type.shape.dim[0]
    axis.Clear()
    axis.dim_param = ROWS


def _forget_rows(graph: GraphProto, rows: int) -> None:
    """Undo what an exporter concluded from a fixed number of rows."""
    del graph.value_info[:]
    for value in graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    _copy_rows_in_reshapes(graph, rows)


def _copy_rows_in_reshapes(graph: GraphProto, rows: int) -> None:
    """Reshapes to [rows, ...] take the size of their first axis from their input instead (0 in ONNX)."""
    from onnx import numpy_helper

    constants = {item.name: item for item in graph.initializer}
    constants |= {
        node.output[0]: attribute.t
        for node in graph.node
        for attribute in node.attribute
        if node.op_type == "Constant" and attribute.name == "value"
    }
    for index, node in enumerate(graph.node):
        if node.op_type != "Reshape" or node.input[1] not in constants:
            continue
        target = numpy_helper.to_array(constants[node.input[1]]).copy()
        if target.size and target[0] == rows and 0 not in target:
            target[0] = 0
            node.input[1] = f"{ROWS}_of_reshape_{index}"
            graph.initializer.append(numpy_helper.from_array(target, node.input[1]))
            # `allowzero` would make the 0 a size; without a 0 before, it meant nothing.
            kept = [item for item in node.attribute if item.name != "allowzero"]
            del node.attribute[:]
            node.attribute.extend(kept)


def _inferred(model: ModelProto) -> ModelProto:
    """With the shapes of everything in between, as far as they can be told: quantizing asks for them."""
    from onnx import shape_inference

    try:
        inferred: ModelProto = shape_inference.infer_shapes(model, data_prop=True)
    except shape_inference.InferenceError:
        return model  # stale notes contradict each other; the runtime goes without
    return inferred


def _shown(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
