"""From an ONNX graph to OpenVINO's own format, compared with the graph before anyone uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from leanserve.comparison import largest_difference, largest_finite
from leanserve.contracts import Array, Model, OnnxModel
from leanserve.errors import PassFailed
from leanserve.passes.toolkit.lowering import CHECKS, feeds, open_session
from leanserve.runtime.formats.openvino import GRAPH, OpenVinoModel

MEASURED_WHILE_RUNNING = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"})
"""Operators that find the range of their input at every run; OpenVINO computes what they belong to in float32."""
ROUNDED = frozenset({"QuantizeLinear", "MatMulNBits"})
"""Operators of graphs in which activations are rounded to integers: by onnxruntime in `MatMulNBits`, too."""
TOLERANCE = 1e-3
"""Largest accepted difference, relative to the largest finite output, of a graph of floats."""
INTEGER_TOLERANCE = 0.05
"""The same where integers are rounded, of which two engines round some the other way."""


def convert(model: OnnxModel, folder: Path, threads: int) -> OpenVinoModel:
    """Write the graph in OpenVINO's format to `folder`.

    Raises:
        PassFailed: OpenVINO cannot read or run it, would lose its quantization, or answers differently.
    """
    import openvino

    operators = {node.op_type for node in onnx.load(model.path, load_external_data=False).graph.node}
    if found := sorted(operators & MEASURED_WHILE_RUNNING):
        raise PassFailed(
            f"the graph finds ranges of activations while running ({', '.join(found)}), and OpenVINO computes such "
            "layers in float32; take quantize_static, or the runtime onnxruntime"
        )
    path = folder / GRAPH
    try:
        graph = openvino.Core().read_model(str(model.path))
        _name_by_place(graph)
        openvino.save_model(graph, str(path), compress_to_fp16=False)
    except RuntimeError as error:
        raise PassFailed(
            f"OpenVINO cannot read the graph: {_last_line(error)}; take the runtime onnxruntime"
        ) from error
    converted = OpenVinoModel(path, model.spec)
    _check(model, converted, threads, INTEGER_TOLERANCE if operators & ROUNDED else TOLERANCE)
    return converted


def _name_by_place(graph: Any) -> None:
    """Rename what OpenVINO named by a counter of its process, so that the same graph gives the same bytes."""
    for place, node in enumerate(graph.get_ordered_ops()):
        kind, _, counter = node.get_friendly_name().rpartition("_")
        if counter.isdigit() and kind == node.get_type_name():
            node.set_friendly_name(f"{kind}.{place}")


def openvino_model(model: Model, kind: str) -> OpenVinoModel:
    """The model as a pass of this kind takes it.

    Raises:
        PassFailed: it is not in OpenVINO's format.
    """
    if isinstance(model, OpenVinoModel):
        return model
    raise PassFailed(f"{kind} takes models in OpenVINO's format, but the model is in the format '{model.format}'")


def _check(model: OnnxModel, converted: OpenVinoModel, threads: int, tolerance: float) -> None:
    session = open_session(model.path, threads)
    names = [item.name for item in model.spec.outputs]
    for most, length in CHECKS:
        batch = feeds(model.spec, model.spec.example(model.spec.most_rows(most), length))
        expected: Any = session.run(names, batch)
        _compare(names, expected, _answers(converted, batch, threads), tolerance)


def _answers(converted: OpenVinoModel, batch: Mapping[str, Array], threads: int) -> list[Array]:
    from openvino import Core

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
    try:
        compiled: Any = Core().compile_model(str(converted.path), "CPU", settings)
        found = compiled(batch)
    except RuntimeError as error:
        text = f"OpenVINO cannot run the graph: {_last_line(error)}; take the runtime onnxruntime"
        raise PassFailed(text) from error
    return [found[compiled.output(item.name)] for item in converted.spec.outputs]


def _compare(names: Sequence[str], expected: Sequence[Array], got: Sequence[Array], tolerance: float) -> None:
    for name, right, found in zip(names, expected, got, strict=True):
        if right.shape != found.shape:
            raise PassFailed(f"in OpenVINO, output '{name}' has shape {found.shape}, not {right.shape}")
        if not np.issubdtype(right.dtype, np.floating):
            continue
        worst = largest_difference(right, found)
        if worst > tolerance * largest_finite(right):
            raise PassFailed(f"in OpenVINO, output '{name}' differs by {worst:.2e}; take the runtime onnxruntime")


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
