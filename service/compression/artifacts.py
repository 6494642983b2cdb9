"""The content-addressed store: what a prefix of build passes produced, on disk, found again by its key.

Layout under the cache folder::

    artifacts/<key>/   model.safetensors | model.onnx, manifest.json, quality.json
    locks/<key>        held (flock) while the artifact is being made; the kernel frees it when a builder dies
    tmp/<key>.*/       half-written artifacts of live or dead builders
    scratch/<key>/     training checkpoints, so that an interrupted pass resumes
    races/<hash>       latencies of a set of artifacts, measured side by side

An artifact is written in `tmp`, its manifest (with the sha256 of every file) last, flushed to disk and renamed into
place in one step: it exists whole or not at all. Weights are safetensors or ONNX, never a pickle.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from service.compression.manifest import Manifest, Measurement, Quality, Recipe, SideBySide
from service.contracts import Model, TorchModel
from service.errors import ArtifactCorrupt, StartupError
from service.machine import cpu_name

TORCH_FILE = "model.safetensors"
ONNX_FILE = "model.onnx"

Document = TypeVar("Document", bound=BaseModel)


class _Sealed(BaseModel):
    """A JSON document with its own checksum, so that a flipped byte in a number cannot pass as a number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    document: str


class ArtifactStore:
    """Finds, verifies and publishes artifacts under one cache folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        try:
            for name in ("artifacts", "locks", "tmp", "scratch", "races"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartupError(
                f"cache folder {self.root}: cannot be created ({error}); set 'cache' or LEANSERVE_CACHE"
            ) from error

    def folder(self, key: str) -> Path:
        """Where the artifact is, or would be."""
        return self.root / "artifacts" / key

    def scratch(self, key: str) -> Path:
        """The folder that survives an interrupted build of this artifact."""
        path = self.root / "scratch" / key
        path.mkdir(exist_ok=True)
        return path

    def recipe(self, key: str) -> Recipe | None:
        """The verified recipe of an artifact; `None` if there is no such artifact.

        Raises:
            ArtifactCorrupt: a file is missing or does not match its checksum.
        """
        folder = self.folder(key)
        if not folder.exists():
            return None
        recipe = _unseal(folder / "manifest.json", Recipe)
        for name, expected in recipe.files.items():
            actual = _sha256(folder / name)
            if actual != expected:
                raise ArtifactCorrupt(f"{folder / name}: sha256 is {actual[:12]}, the manifest says {expected[:12]}")
        return recipe

    def measurement(self, key: str) -> Measurement | None:
        """Answers and size as measured last; `None` if never measured (or unreadable: then it is measured again)."""
        path = self.folder(key) / "quality.json"
        try:
            return _unseal(path, Measurement) if path.exists() else None
        except ArtifactCorrupt:
            return None

    def manifest(self, key: str, race: SideBySide) -> Manifest | None:
        """Recipe, answers and speed together; `None` unless all are there and of the same machine."""
        recipe, measured, latency = self.recipe(key), self.measurement(key), race.latency_ms.get(key)
        if recipe is None or measured is None or latency is None:
            return None
        if (measured.cpu, measured.threads) != (race.cpu, race.threads):
            return None
        throughput = max(rows / ms * 1000 for rows, ms in latency.items())
        quality = Quality(**measured.fidelity.model_dump(), latency_ms=latency, throughput=throughput)
        return Manifest(**recipe.model_dump(), quality=quality, cpu=race.cpu, threads=race.threads)

    def side_by_side(self, keys: Sequence[str], threads: int) -> SideBySide | None:
        """The latencies of exactly these artifacts, if they were measured together on this machine."""
        path = self._race(keys, threads)
        try:
            return _unseal(path, SideBySide) if path.exists() else None
        except ArtifactCorrupt:
            return None

    def keep_side_by_side(self, keys: Sequence[str], race: SideBySide) -> None:
        """Store latencies that were measured together."""
        temporary = self.root / "tmp" / f"race.{os.getpid()}"
        _seal(temporary, race)
        temporary.rename(self._race(keys, race.threads))

    def _race(self, keys: Sequence[str], threads: int) -> Path:
        together = "\n".join([*sorted(keys), cpu_name(), str(threads)])
        return self.root / "races" / hashlib.sha256(together.encode()).hexdigest()

    def chain(self, key: str) -> tuple[Recipe, ...]:
        """The verified recipes from the base up to `key`.

        Raises:
            ArtifactCorrupt: one of them is missing or damaged.
        """
        recipe = self.recipe(key)
        if recipe is None:
            raise ArtifactCorrupt(f"{self.folder(key)}: the artifact is missing")
        return (*self.chain(recipe.parent), recipe) if recipe.parent else (recipe,)

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the right to make this artifact; waits for another builder, which may be another process."""
        with (self.root / "locks" / key).open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    @contextmanager
    def workspace(self, key: str) -> Iterator[Path]:
        """A temporary folder for the artifact's files; call under `lock`. Leftovers of killed builders are removed."""
        for stale in (self.root / "tmp").glob(f"{key}.*"):
            shutil.rmtree(stale, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=self.root / "tmp"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, folder: Path, recipe: Recipe) -> None:
        """Seal the files in `folder` with the manifest and move them into place atomically."""
        for name in recipe.files:
            _flush(folder / name)
        _seal(folder / "manifest.json", recipe)
        _flush(folder)
        folder.rename(self.folder(recipe.key))
        _flush(self.root / "artifacts")
        shutil.rmtree(self.root / "scratch" / recipe.key, ignore_errors=True)

    def attach(self, key: str, measurement: Measurement) -> None:
        """Store (or replace) the measurement of a published artifact."""
        temporary = self.root / "tmp" / f"{key}.{os.getpid()}.quality"
        _seal(temporary, measurement)
        temporary.rename(self.folder(key) / "quality.json")

    def discard(self, key: str) -> None:
        """Remove a damaged artifact; it is renamed first, so that nobody sees it half-removed."""
        grave = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=self.root / "tmp"))
        self.folder(key).rename(grave / "discarded")
        shutil.rmtree(grave, ignore_errors=True)


def write_model(model: Model, folder: Path) -> None:
    """Store the weights of a torch module, or the file of an ONNX model."""
    if isinstance(model, TorchModel):
        from service.compression.tools.ties import write_tensors

        write_tensors(model.module.state_dict(), folder / TORCH_FILE)
    else:
        (folder / ONNX_FILE).write_bytes(model.path.read_bytes())


def checksums(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder."""
    return {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.is_file()}


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactCorrupt(f"{path}: cannot be read ({error})") from error


def _seal(path: Path, document: BaseModel) -> None:
    text = document.model_dump_json()
    sealed = _Sealed(sha256=hashlib.sha256(text.encode()).hexdigest(), document=text)
    path.write_text(sealed.model_dump_json(), encoding="utf-8")
    _flush(path)


def _unseal(path: Path, kind: type[Document]) -> Document:
    try:
        sealed = _Sealed.model_validate_json(path.read_bytes())
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        raise ArtifactCorrupt(f"{path}: cannot be read ({type(error).__name__})") from error
    if hashlib.sha256(sealed.document.encode()).hexdigest() != sealed.sha256:
        raise ArtifactCorrupt(f"{path}: does not match its checksum")
    try:
        return kind.model_validate(json.loads(sealed.document))
    except ValidationError as error:
        raise ArtifactCorrupt(f"{path}: was written by another version of leanserve") from error


def _flush(path: Path) -> None:
    """Ask the disk to keep a file or folder, so that a power cut after the rename cannot leave it empty."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
