"""Makes a graph that somebody brought fit to be served: its first axis counts rows, its shapes are known.

Exporters often write a batch of one into the graph. Much of that can be undone: the axis gets a name, shapes that were
inferred from it are dropped and inferred anew, reshapes to a fixed number of rows copy the number from their input.
With `base.rows: one` it stays as it is, and a graph without an axis of rows gets one (`onnx_whole`). No rule is sure to
be right, so there are several candidates, and none is believed until `onnx_trial` has run it beside the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from leanserve.bases.description import Tensor
from leanserve.bases.inputs import audio_tensor, image_tensor
from leanserve.bases.meanings import LastOperator
from leanserve.bases.sources.onnx_reading import LEAST_OPSET, last_nodes, modern, opset_of
from leanserve.bases.sources.onnx_whole import LoneAxes, add_axis_of_rows, sizes_of_whole
from leanserve.bases.sources.onnx_words import known_words
from leanserve.config.base_section import BroughtBase, ImageInput
from leanserve.errors import ConfigError
from leanserve.texts import STRING

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, ValueInfoProto

ROWS = "rows"
DeclaredBase = Mapping[str, Tensor]
ONE_BY_ONE = "with base.rows: one the graph runs once per row, and a row is all that it takes at once"


@dataclass(frozen=True)
class Prepared:
    """A graph that takes rows, what it takes and gives, and the batch size that was fixed in the file, if any was.

    `whole`: a row is all that the graph in the file takes at once. `endings`: the last operators of the outputs.
    """

    model: ModelProto
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...]
    endings: tuple[LastOperator | None, ...]
    fixed_rows: int | None = None
    whole: bool = False


def candidates(model: ModelProto, path: Path, declared: BroughtBase) -> Iterator[Callable[[], Prepared]]:
    """Ways to prepare a model, which stays as it is, best first; each may raise a `ConfigError`.

    Converting a graph to newer operators goes wrong at times, so that every way is also tried without.
    """
    _keep_true_inputs(model)
    for version in (modern, _copied) if opset_of(model) < LEAST_OPSET else (modern,):
        for way in _ways(model.graph, declared):
            yield partial(_prepared_by, way, version, model, path, declared)


def _prepared_by(way: Way, version: Version, model: ModelProto, path: Path, declared: BroughtBase) -> Prepared:
    return way(_tidied(version(_copied(model, path), path)), declared)


Way = Callable[["ModelProto", BroughtBase], Prepared]
Version = Callable[["ModelProto", Path], "ModelProto"]


def _ways(graph: GraphProto, declared: BroughtBase) -> tuple[Way, ...]:
    """How the model may get its axis of rows, in this order."""
    if declared.rows != "one":
        return (prepared,)
    whole = tuple(partial(prepared_whole, lone=lone) for lone in ("named", "unknown"))
    if isinstance(declared.image, ImageInput) or declared.text is not None or declared.audio is not None:
        return (prepared,)
    firsts = {_first_size(item) for item in graph.input}
    wishes = declared.inputs or {}
    as_whole = any(
        item.name in wishes and len(wishes[item.name].shape) == len(item.type.tensor_type.shape.dim)
        for item in graph.input
        if item.type.tensor_type.HasField("shape")
    )
    return whole if as_whole else (prepared, *whole) if len(firsts) == 1 else (*whole, prepared)


def prepared(model: ModelProto, declared: BroughtBase) -> Prepared:
    """Give the model a dynamic first axis and complete its shapes; the model is changed.

    A first axis of 1 stays where no row has company.

    Raises:
        ConfigError: an input is no tensor, has no axis of rows, or is not what the config declares.
    """
    graph = model.graph
    wishes = _wishes(declared, [item.name for item in graph.input])
    inputs = tuple(_settled(item, wishes) for item in graph.input)
    if declared.text is not None:
        _refuse_fixed_length(inputs)
    fixed = {size for item in graph.input if (size := _first_size(item)) is not None}
    if len(fixed) > 1:
        raise ConfigError(
            f"base.onnx: the inputs have different fixed first axes ({', '.join(map(str, sorted(fixed)))}); the first "
            f"axis must count the rows. Export it again with a dynamic batch axis; or {ONE_BY_ONE}"
        )
    if not (declared.rows == "one" and fixed == {1}):
        for value in graph.input:
            _name_axis(value)
        if fixed:
            _forget_rows(graph, next(iter(fixed)))
    return _finished(model, inputs, next(iter(fixed), None))


def prepared_whole(model: ModelProto, declared: BroughtBase, lone: LoneAxes) -> Prepared:
    """Put an axis of rows in front of all that the model takes and gives; the model is changed.

    Raises:
        ConfigError: an input is no tensor, or is not what the config declares.
    """
    wishes = _wishes(declared, [item.name for item in model.graph.input])
    inputs = tuple(_settled_whole(item, wishes, lone) for item in model.graph.input)
    add_axis_of_rows(model)
    return _finished(model, inputs, whole=True)


def fix_sizes(ready: Prepared, inputs: Sequence[Tensor]) -> None:
    """Write the sizes of these inputs into the graph, which is changed."""
    for value, item in zip(ready.model.graph.input, inputs, strict=True):
        for axis, size in zip(value.type.tensor_type.shape.dim[1:], item.shape, strict=True):
            if size is not None:
                axis.dim_value = size


def _finished(
    model: ModelProto, inputs: tuple[Tensor, ...], fixed_rows: int | None = None, *, whole: bool = False
) -> Prepared:
    names = tuple(item.name for item in model.graph.output)
    words = known_words(model.graph)
    inputs = tuple(item.model_copy(update={"words": words.get(item.name, ())}) for item in inputs)
    return Prepared(_inferred(model), inputs, names, tuple(last_nodes(model.graph)), fixed_rows, whole)


def _copied(model: ModelProto, _: Path) -> ModelProto:
    copy = type(model)()
    copy.CopyFrom(model)
    return copy


def _tidied(model: ModelProto) -> ModelProto:
    """With weights where passes look for them, and with tensors as its only outputs."""
    _lift_constants(model.graph)
    _give_tensors(model.graph)
    return model


def _lift_constants(graph: GraphProto) -> None:
    """Weights in nodes of their own, as some converters write them, become initializers."""
    outputs = {item.name for item in graph.output}
    kept = []
    for node in graph.node:
        [attribute, *_] = node.attribute or [None]
        if node.op_type == "Constant" and attribute.name == "value" and node.output[0] not in outputs:
            attribute.t.name = node.output[0]
            graph.initializer.append(attribute.t)
        else:
            kept.append(node)
    if len(kept) < len(graph.node):
        del graph.node[:]
        graph.node.extend(kept)


def _give_tensors(graph: GraphProto) -> None:
    """Converters of classic models give the probabilities as maps: take the tensor behind them."""
    maps = {node.output[0]: node for node in graph.node if node.op_type == "ZipMap"}
    for value in graph.output:
        if value.name in maps:
            node = maps[value.name]
            node.op_type, node.domain = "Identity", ""
            del node.attribute[:]
            value.type.Clear()
            value.type.tensor_type.elem_type = 1


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
    if declared.audio is not None:
        if len(names) != 1:
            raise ConfigError(
                f"base.audio: the model takes {len(names)} inputs ({', '.join(names)}), not one of samples"
            )
        return {names[0]: audio_tensor(declared.audio)}
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
        raise ConfigError(
            f"base.onnx: the input '{value.name}' is a single value; the first axis must count the rows; {ONE_BY_ONE}"
        )
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


def _settled_whole(value: ValueInfoProto, wishes: DeclaredBase, lone: LoneAxes) -> Tensor:
    """One input of a graph without an axis of rows, with all of its axes."""
    dtype, wish = _dtype(value), wishes.get(value.name)
    sizes = sizes_of_whole(value, lone)
    if wish is not None and (wish.dtype, len(wish.shape)) != (dtype, len(sizes)):
        raise ConfigError(
            f"base: the config declares {wish.dtype} {_shown(wish.shape)} for the input '{value.name}', which takes "
            f"{dtype} {_shown(sizes)}"
        )
    return Tensor(name=value.name, dtype=dtype, shape=sizes if wish is None else wish.shape)


def _first_size(value: ValueInfoProto) -> int | None:
    """The fixed size of the first axis, if it has one."""
    axes = value.type.tensor_type.shape.dim
    return axes[0].dim_value if axes and axes[0].dim_value > 0 else None


def _dtype(value: ValueInfoProto) -> str:
    from onnx import TensorProto, helper

    if not value.type.HasField("tensor_type"):
        kind = value.type.WhichOneof("value")
        raise ConfigError(f"base.onnx: the input '{value.name}' is a {kind}, not a tensor")
    code = value.type.tensor_type.elem_type
    if code == TensorProto.STRING:
        return STRING
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
