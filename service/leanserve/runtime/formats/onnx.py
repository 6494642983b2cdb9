"""ONNX graphs: one file each, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from leanserve.contracts import Backend, ModelSize, ModelSpec, OnnxModel, Share

if TYPE_CHECKING:
    from torch import nn

GRAPH = "model.onnx"


class OnnxFormat:
    """A `contracts.Format`."""

    name = OnnxModel.format
    libraries = ("onnx", "onnxruntime")
    runtime_module = "onnxruntime"
    self_contained = True
    places_threads = True
    in_memory = False

    def save(self, model: OnnxModel, folder: Path) -> None:
        (folder / GRAPH).write_bytes(model.path.read_bytes())

    def load(self, folder: Path, spec: ModelSpec, rebuild: Callable[[], nn.Module]) -> OnnxModel:  # noqa: ARG002
        """The graph is read when it is opened; a load pass may still set options of the session."""
        return OnnxModel(folder / GRAPH, spec)

    def size(self, model: OnnxModel) -> ModelSize:
        from leanserve.runtime.formats.onnx_size import graph_size

        return graph_size(model.path)

    def open(self, model: OnnxModel, share: Share) -> Backend:
        from leanserve.runtime.backends.onnx_runtime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(model, share.threads, share.device, alone=share.alone, processors=share.processors)


FORMAT = OnnxFormat()
