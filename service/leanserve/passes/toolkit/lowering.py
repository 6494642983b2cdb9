"""From a torch module to an ONNX file that answers the same, for any number of rows.

Exporters specialise silently: a batch axis traced with one row stays one row, and a wrong graph still runs. So the
example has two rows, every axis that the spec leaves open is exported as dynamic, and the file is compared with the
module at one row and at three before anyone uses it. A base whose rows share no batch is exported for one row.

The exporter names nodes by counters and stores source paths and stack traces of the exporting machine. Here a node is
called after the layer it came from (`blocks.0.conv1/Conv`), which is what globs in options match, and the traces are
dropped: the same model gives the same bytes.
"""

from __future__ import annotations

import ast
import copy
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from leanserve.comparison import largest_difference, largest_finite
from leanserve.contracts import Arrays, Model, ModelSpec, OnnxModel, RowsTogether, TensorSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.toolkit.narrow_graph import narrow_graph
from leanserve.passes.toolkit.recurrent_shapes import recurrent_shapes
from leanserve.runtime.formats.expected import onnx_model, torch_model
from leanserve.runtime.formats.onnx_session import onnx_session

OPSET = 20
"""First with a whole `Gelu`; every operator of it has a kernel in all supported runtimes."""

EXAMPLE_ROWS = 2
"""torch.export takes an axis of size 1 for a constant."""

CHECKS = ((1, 16), (3, 11))
"""Rows and length (of dynamic axes) at which the file is compared with the module."""

TOLERANCE = 1e-3
"""Largest accepted difference, relative to the largest finite output: float32 sums in another order, many layers."""

TALKATIVE = ("onnx_ir", "onnxscript", "torch.onnx._internal.exporter._registration")
"""Loggers that tell every rewriting step, and that torchvision is missing."""

PREFIX = "spec."
"""The exporter calls tensors after operators (`embedding`) and takes no care that an output may be called so."""

LARGEST_BYTES = 2**31 - 1
"""A protobuf message cannot be larger, and artifacts are single files."""


def as_onnx(model: Model, path: Path) -> OnnxModel:
    """The model as it is if it is ONNX already, else exported to `path`."""
    if model.format == OnnxModel.format:
        return onnx_model(model, "the runtime")
    return export_onnx(torch_model(model, "the export to ONNX"), path)


def export_onnx(model: TorchModel, path: Path) -> OnnxModel:
    """Export to a single file at `path`; inputs and outputs carry the names of the spec's fields.

    Raises:
        PassFailed: the module cannot be exported, is too large for one file, or the file answers differently.
    """
    size = sum(weight.nbytes for weight in (*model.module.parameters(), *model.module.buffers()))
    if size > LARGEST_BYTES:
        raise PassFailed(
            f"the weights take {size / 2**30:.1f} GiB, a single ONNX file holds less than 2; cast or shrink"
        )
    graph = _exported(model)
    _tidy(graph)
    _give_names(graph.graph)
    for storage in set(model.storage.values()):
        narrow_graph(graph, storage, only_exact=True)
    onnx.save(graph, path)
    exported = OnnxModel(path, model.spec)
    _check(model, exported)
    return exported


def exported_program(model: TorchModel) -> torch.export.ExportedProgram:
    """The module as a program of torch.export that answers the same for any number of rows.

    Raises:
        PassFailed: it cannot be exported, or answers differently.
    """
    spec = model.spec
    example = tuple(torch.from_numpy(array) for array in spec.example(spec.most_rows(EXAMPLE_ROWS)))
    shapes = tuple(dict.fromkeys(_dynamic_axes(item, spec.rows), torch.export.Dim.AUTO) for item in spec.inputs)
    with _quiet(), recurrent_shapes(), torch.no_grad():
        try:
            program = torch.export.export(_kernels_in_order(model.module), example, dynamic_shapes=shapes)
            ours, theirs = model.module, program.module()
            for rows, length in CHECKS:
                batch = [torch.from_numpy(array) for array in spec.example(spec.most_rows(rows), length, seed=rows)]
                torch.testing.assert_close(theirs(*batch), ours(*batch), rtol=TOLERANCE, atol=TOLERANCE)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise PassFailed(f"the model cannot be exported as a program: {_reason(error)}") from error
    return program


def _kernels_in_order(module: torch.nn.Module) -> torch.nn.Module:
    """The module, or a copy of it whose kernels are stored in the order of their axes.

    With any other order torch.export guards a program that is for all numbers of rows against a single one, whose
    order is ambiguous. Whatever compiles the program chooses an order of its own.
    """
    if all(weight.is_contiguous() for weight in module.parameters() if weight.ndim == 4):
        return module
    module = copy.deepcopy(module)
    for weight in module.parameters():
        if weight.ndim == 4:
            weight.data = weight.data.contiguous()
    return module


def open_session(model: Path | onnx.ModelProto, threads: int = 1) -> onnxruntime.InferenceSession:
    """A CPU session for building, silent and without idle spinning; serving uses the backend."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnx_session(source, options)


def _exported(model: TorchModel) -> onnx.ModelProto:
    spec = model.spec
    example = tuple(torch.from_numpy(array) for array in spec.example(spec.most_rows(EXAMPLE_ROWS)))
    with _quiet(), recurrent_shapes(), torch.no_grad():
        try:
            program = torch.onnx.export(
                model.module,
                example,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[PREFIX + item.name for item in spec.inputs],
                output_names=[PREFIX + item.name for item in spec.outputs],
                dynamic_shapes=tuple(_dynamic_axes(item, spec.rows) for item in spec.inputs),
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise PassFailed(f"the model cannot be exported to ONNX: {_reason(error)}{_remedy(model)}") from error
    assert program is not None
    graph: onnx.ModelProto = program.model_proto
    return graph


def _reason(error: BaseException) -> str:
    """The first lines of the innermost cause: the exporter wraps it in pages of advice."""
    while error.__cause__:
        error = error.__cause__
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def _remedy(model: TorchModel) -> str:
    """What to do about layers that are known not to be exportable; nothing for others."""
    plain = any(type(layer) is torch.nn.RNN for layer in model.module.modules())
    if plain and any(None in item.shape for item in model.spec.inputs):
        return ". torch exports nn.LSTM and nn.GRU for any length, nn.RNN only for a fixed one"
    return ""


def _dynamic_axes(item: TensorSpec, rows: RowsTogether) -> dict[int, str]:
    """Names of the axes that may vary; axes found to be always equal end up with one name."""
    open_axes = {axis: f"{item.name}_{axis}" for axis, size in enumerate(item.shape, start=1) if size is None}
    return open_axes if rows == "one" else {0: "rows", **open_axes}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on what does not concern the model."""
    levels = {logger: logger.level for logger in map(logging.getLogger, TALKATIVE)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # Copying torch's own tree specs trips over torch's own deprecation.
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
            # Axes of equal size share one name, which is what we want.
            warnings.filterwarnings("ignore", message="# The axis name: ", category=UserWarning)
            # Of the exporter's own loop over the steps of a recurrent layer, and of the layer's list of its weights.
            warnings.filterwarnings("ignore", message="_check_is_size will be removed", category=FutureWarning)
            warnings.filterwarnings("ignore", message=r"The tensor attributes? .*_flat_weights", category=UserWarning)
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _tidy(model: onnx.ModelProto) -> None:
    """Name nodes after their layers, drop traces of the exporting machine and initializers that nothing reads."""
    graph = model.graph
    seen: Counter[str] = Counter()
    for node in graph.node:
        name = _layer_name(node)
        node.name = f"{name}_{seen[name]}" if seen[name] else name
        seen[name] += 1
    described: list[Any] = [model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output]
    for item in [*described, *graph.value_info, *model.functions]:
        del item.metadata_props[:]
        item.doc_string = ""
    read = {name for node in graph.node for name in node.input} | {item.name for item in graph.output}
    kept = [item for item in graph.initializer if item.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _give_names(graph: onnx.GraphProto) -> None:
    """Take the prefix off inputs and outputs; a tensor inside that has such a name already gets it instead."""
    outside = [item.name for item in (*graph.input, *graph.output)]
    names = {name: name.removeprefix(PREFIX) for name in outside}
    names |= {inner: PREFIX + inner for inner in names.values()}
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    named: list[Any] = [*graph.input, *graph.output, *graph.value_info, *graph.initializer]
    for item in named:
        item.name = names.get(item.name, item.name)


def _layer_name(node: onnx.NodeProto) -> str:
    """`path.of.module/OpType`; only the type for what the root module does itself."""
    owner = _scope(node)
    if node.op_type == "Conv" and node.input[1].endswith(".weight"):
        # Folded with its batch norm, a convolution is filed under the norm; its weight still knows better.
        owner = node.input[1].removesuffix(".weight")
    return f"{owner}/{node.op_type}" if owner else str(node.op_type)


def _scope(node: onnx.NodeProto) -> str:
    """Path of the innermost module, as the exporter noted it."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            modules = ast.literal_eval(entry.value)[:-1]
            inner = str(modules[-1]) if modules else ""
            return "" if inner.startswith("_empty") else inner
    return ""


def _check(model: TorchModel, exported: OnnxModel) -> None:
    session = open_session(exported.path)
    for most, length in CHECKS:
        rows = model.spec.most_rows(most)
        batch = model.spec.example(rows, length)
        expected = _torch_outputs(model.module, batch)
        try:
            got = session.run(None, feeds(model.spec, batch))
        except Exception as error:  # the runtime has errors of many families
            raise PassFailed(
                f"exported to ONNX, the model does not run on {rows} rows of length {length}: {_reason(error)}"
            ) from error
        _compare(model.spec, rows, expected, got)


def feeds(spec: ModelSpec, batch: Arrays) -> dict[str, Any]:
    """The batch by the names of its fields, as a session wants it."""
    return {item.name: array for item, array in zip(spec.inputs, batch, strict=True)}


def _torch_outputs(module: torch.nn.Module, batch: Arrays) -> list[Any]:
    with torch.inference_mode():
        outputs = module(*(torch.from_numpy(array) for array in batch))
    return [item.numpy() for item in (outputs if isinstance(outputs, tuple) else (outputs,))]


def _compare(spec: ModelSpec, rows: int, expected: Sequence[Any], got: Sequence[Any]) -> None:
    for item, right, found in zip(spec.outputs, expected, got, strict=True):
        if right.shape != found.shape:
            raise PassFailed(
                f"exported to ONNX, output '{item.name}' has shape {found.shape}, not {right.shape}, at {rows} rows"
            )
        worst = largest_difference(right, found)
        if worst > TOLERANCE * largest_finite(right):
            raise PassFailed(f"exported to ONNX, output '{item.name}' differs by {worst:.2e} at {rows} rows")
