"""`base: {onnx: FILE}`: a model that is an ONNX graph already.

There are no layers in it that a pass could prune or train, so only passes on ONNX apply. Input names are the graph's
own; dtypes and shapes come from the graph, and from the config where the graph leaves them open. The uncompressed
variant is the graph itself in onnxruntime.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from leanserve.bases.checkpoints import file_digest
from leanserve.bases.description import Description, Tensor
from leanserve.bases.inputs import described
from leanserve.bases.meanings import proven
from leanserve.bases.naming import served_name
from leanserve.bases.sources.onnx_endings import last_nodes
from leanserve.bases.sources.onnx_preparation import Prepared, prepared
from leanserve.bases.sources.onnx_reading import files_of, modern, nodes_of, read_onnx
from leanserve.bases.sources.onnx_trial import Trial, tried
from leanserve.config.base_section import OnnxBase
from leanserve.contracts import ModelSpec, OnnxModel
from leanserve.errors import ConfigError
from leanserve.hardware import library_version

if TYPE_CHECKING:
    from onnx import ModelProto

LIBRARIES = ("onnx", "onnxruntime")
SCALED_BY_BATCH = "DynamicQuantize"
"""How operators that find the scale of activations at run time begin."""


@dataclass(frozen=True)
class OnnxSource:
    """A `bases.opening.Source`."""

    declared: OnnxBase
    folder: Path

    def fingerprint(self) -> str:
        """sha256 (hex) over the file, those that hold its tensors, and the versions of what prepares and runs it."""
        total = hashlib.sha256()
        for library in LIBRARIES:
            total.update(f"{library}=={_version(library)}\n".encode())
        for path in files_of(self._path):
            total.update(f"{file_digest(path)}\n".encode())
        return total.hexdigest()

    def describe(self) -> Description:
        with tempfile.TemporaryDirectory(prefix="leanserve-onnx-") as folder:
            inputs, outputs = self._tensors(Path(folder))
        return described(self.declared, self.folder, served_name(self._path), inputs, outputs)

    def model(self, spec: ModelSpec) -> OnnxModel:
        """The prepared graph as one file, which lives as long as this source does."""
        import onnx

        path = self._workplace / "model.onnx"
        if not path.exists():
            onnx.save(self._prepared(read_onnx(self._path)).model, path)
        return OnnxModel(path, spec)

    @property
    def _path(self) -> Path:
        return self.folder / self.declared.onnx

    @cached_property
    def _workplace(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="leanserve-onnx-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    def _prepared(self, model: ModelProto) -> Prepared:
        return prepared(modern(model, self._path), self.declared)

    def _tensors(self, folder: Path) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Inputs and outputs of the graph, which is prepared in `folder` and run beside what was read."""
        import onnx

        original, candidate = folder / "original.onnx", folder / "candidate.onnx"
        model = read_onnx(self._path)
        onnx.save(model, original)
        ready = self._prepared(model)
        onnx.save(ready.model, candidate)
        trial = Trial(
            original=original,
            candidate=candidate,
            inputs=ready.inputs,
            outputs=ready.outputs,
            fixed_rows=ready.fixed_rows,
            scaled_by_batch=any(node.op_type.startswith(SCALED_BY_BATCH) for node in nodes_of(ready.model.graph)),
            rows=self.declared.rows,
        )
        try:
            outputs = tried(trial)
        except ConfigError as error:
            raise ConfigError(f"base.onnx: {self._path} cannot be served: {error}") from error
        operators = last_nodes(ready.model.graph)
        return ready.inputs, tuple(proven(*pair) for pair in zip(outputs, operators, strict=True))


def _version(library: str) -> str:
    found = library_version(library)
    if found is None:
        raise ConfigError("base.onnx: needs the extra 'cpu' (or 'gpu'): pip install 'leanserve[cpu]'")
    return found
