"""OpenVINO's own files: a graph as XML, its weights in a file beside it; run by OpenVINO."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from leanserve.contracts import Backend, Json, ModelSize, ModelSpec, Share

if TYPE_CHECKING:
    from torch import nn

GRAPH = "model.xml"
WEIGHTS = "model.bin"


@dataclass(frozen=True, slots=True)
class OpenVinoModel:
    """A graph at `path`, its weights beside it; `settings` holds what the pass decided for compiling it."""

    format: ClassVar[str] = "openvino"
    path: Path
    spec: ModelSpec
    settings: Mapping[str, Json] = field(default_factory=dict)


class OpenVinoFormat:
    """A `contracts.Format`."""

    name = OpenVinoModel.format
    libraries = ("openvino",)
    runtime_module = "openvino"
    self_contained = True
    places_threads = False
    in_memory = False

    def save(self, model: OpenVinoModel, folder: Path) -> None:
        shutil.copyfile(model.path, folder / GRAPH)
        shutil.copyfile(model.path.with_suffix(".bin"), folder / WEIGHTS)

    def load(self, folder: Path, spec: ModelSpec, rebuild: Callable[[], nn.Module]) -> OpenVinoModel:  # noqa: ARG002
        """The graph is read when it is opened; the load pass sets how it is compiled."""
        return OpenVinoModel(folder / GRAPH, spec)

    def size(self, model: OpenVinoModel) -> ModelSize:
        """Numbers in the weights; multiply-accumulates are told by the formats from which models come here."""
        from openvino import Core

        constants = (node for node in Core().read_model(model.path).get_ops() if node.get_type_name() == "Constant")
        return ModelSize(0, sum(node.get_output_size() and node.data.size for node in constants if node.data.ndim))

    def open(self, model: OpenVinoModel, share: Share) -> Backend:
        from leanserve.runtime.backends.openvino import OpenVinoBackend

        precision = str(model.settings.get("precision", "f32"))
        return OpenVinoBackend(model.path, model.spec, precision, share.threads, share.callers)


FORMAT = OpenVinoFormat()
