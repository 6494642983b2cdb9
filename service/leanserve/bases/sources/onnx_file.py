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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from leanserve.bases.checkpoints import file_digest
from leanserve.bases.datasets.arrays import first_rows
from leanserve.bases.datasets.columns import first_lines
from leanserve.bases.description import Description, Tensor
from leanserve.bases.inputs import bounds_of, described, served_name
from leanserve.bases.meanings import proven
from leanserve.bases.sources.onnx_preparation import Prepared, candidates, fix_sizes
from leanserve.bases.sources.onnx_reading import files_of, nodes_of, read_onnx, written_sizes
from leanserve.bases.sources.onnx_trial import Trial, Verdict, tried
from leanserve.bases.sources.onnx_words import named_classes
from leanserve.config.base_section import OnnxBase
from leanserve.config.data_section import ArrayFileData, TableData
from leanserve.contracts import ModelSpec, OnnxModel
from leanserve.errors import ConfigError
from leanserve.hardware import library_version
from leanserve.texts import of_fixed_width

LIBRARIES = ("onnx", "onnxruntime")
SCALED_BY_BATCH = "DynamicQuantize"
"""How operators that find the scale of activations at run time begin."""


class _Chosen(NamedTuple):
    """A graph that is ready to be served, and what was found out about it."""

    path: Path
    verdict: Verdict
    classes: tuple[str, ...]
    """What the graph calls its classes, if it does."""


@dataclass(frozen=True)
class OnnxSource:
    """A `bases.origin.Source`."""

    declared: OnnxBase
    folder: Path
    data: ArrayFileData | TableData | None = None
    """Where rows of the user's own are, on which the graph is tried."""

    def fingerprint(self) -> str:
        """sha256 (hex) over the file, those that hold its tensors, and the versions of what prepares and runs it."""
        total = hashlib.sha256()
        for library in LIBRARIES:
            total.update(f"{library}=={_version(library)}\n".encode())
        for path in files_of(self._path):
            total.update(f"{file_digest(path)}\n".encode())
        return total.hexdigest()

    def describe(self) -> Description:
        found = self._chosen.verdict
        return described(self.declared, self.folder, served_name(self._path), found, self._chosen.classes)

    def model(self, spec: ModelSpec) -> OnnxModel:
        """The prepared graph as one file, which lives as long as this source does."""
        return OnnxModel(self._chosen.path, spec)

    @property
    def _path(self) -> Path:
        return self.folder / self.declared.onnx

    @cached_property
    def _workplace(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="leanserve-onnx-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    @cached_property
    def _chosen(self) -> _Chosen:
        """The first preparation of the graph that runs, and answers like the file.

        Raises:
            ConfigError: none does; the text says what was wrong with the first.
        """
        import onnx

        model = read_onnx(self._path)
        original = self._workplace / "original.onnx"
        onnx.save(model, original)
        first: ConfigError | None = None
        for candidate in candidates(model, self._path, self.declared):
            try:
                return self._tried(candidate(), original)
            except ConfigError as error:
                first = first or error
        assert first is not None
        if str(first).startswith("base"):
            raise first
        raise ConfigError(f"base.onnx: {self._path} cannot be served: {first}") from first

    def _sample(self, inputs: Sequence[Tensor]) -> Path | None:
        """The first rows of the user's own in a file, if they are arrays or columns for these inputs."""
        if self.data is None or self.declared.image is not None:
            return None
        if isinstance(self.data, TableData):
            rows = first_lines(self.data, [item.field() for item in inputs], self.folder)
        else:
            rows = first_rows(self.data, [item.name for item in inputs], self.folder)
        if rows is None:
            return None
        path = self._workplace / "sample.npz"
        np.savez(path, *map(of_fixed_width, rows))
        return path

    def _tried(self, ready: Prepared, original: Path) -> _Chosen:
        import onnx

        path = self._workplace / "model.onnx"
        onnx.save(ready.model, path)
        trial = Trial(
            original=original,
            candidate=path,
            inputs=ready.inputs,
            outputs=ready.outputs,
            fixed_rows=ready.fixed_rows,
            scaled_by_batch=any(node.op_type.startswith(SCALED_BY_BATCH) for node in nodes_of(ready.model.graph)),
            rows=self.declared.rows,
            whole=ready.whole,
            bounds=bounds_of(self.declared),
            written=written_sizes(ready.model.graph),
            sample=self._sample(ready.inputs),
        )
        found = tried(trial)
        if found.inputs != ready.inputs:
            fix_sizes(ready, found.inputs)
            onnx.save(ready.model, path)
        outputs = tuple(proven(*pair) for pair in zip(found.outputs, ready.endings, strict=True))
        return _Chosen(path, found.model_copy(update={"outputs": outputs}), named_classes(ready.model.graph))


def _version(library: str) -> str:
    found = library_version(library)
    if found is None:
        raise ConfigError("base.onnx: needs the extra 'cpu' (or 'gpu'): pip install 'leanserve[cpu]'")
    return found
