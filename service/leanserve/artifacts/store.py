"""The content-addressed store: what a prefix of build passes produced, on disk, found again by its key.

Layout under the cache folder::

    artifacts/<key>/   what the format and the pass saved, in subfolders too; manifest.json, quality.json
    bases/<key>        what a base takes and gives (`leanserve.bases.description`)
    locks/<key>        held (flock) while the artifact is being made; the kernel frees it when a builder dies
    tmp/<key>.*        half-written artifacts and documents of live or dead builders
    scratch/<key>/     training checkpoints, so that an interrupted pass resumes
    benchmarks/<key>.<anchor and machine>   how fast an artifact is beside an anchor (`leanserve.artifacts.benchmarks`)
    benchmarks/lanes-<key>.<machine>        its rows per second with one lane and with several

An artifact is written in `tmp`, its manifest (with the sha256 of every file) last, flushed to disk and renamed into
place in one step: it exists whole or not at all. Weights are safetensors or ONNX, never a pickle. Every document is
sealed with the key of what it speaks of, so that what was damaged, or copied here from elsewhere, is not believed.

A cache that cannot be written is only read. Its artifacts are as good as any; how fast they are may have been measured
on another machine.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from leanserve.artifacts.benchmarks import BenchmarkResult, BenchmarkSet, Change, LaneRates
from leanserve.artifacts.manifest import Failure, Manifest, Measurement, Quality, Recipe
from leanserve.artifacts.sealed import Document, seal, unseal
from leanserve.contracts import Format
from leanserve.disk import may_write, sha256_of
from leanserve.errors import ArtifactCorrupt, PassFailed, StartupError
from leanserve.runtime.formats import format_named

ABANDONED_S = 30 * 86_400.0
"""Since a training wrote its last checkpoint: its pass is in no config any more, or was changed."""
FOLDERS = ("artifacts", "bases", "failures", "locks", "tmp", "scratch", "benchmarks")


class ArtifactStore:
    """Finds, verifies and publishes artifacts under one cache folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        folders = [self.root / name for name in FOLDERS]
        self.writable = all(map(may_write, folders))
        """Whether anything can be added; if not, nothing is ever made, locked or removed."""
        if self.root.is_dir() and not self.writable:
            return
        try:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartupError(
                f"cache folder {self.root}: cannot be created ({error.strerror}); set 'cache' or LEANSERVE_CACHE"
            ) from error

    def folder(self, key: str) -> Path:
        """Where the artifact is, or would be."""
        return self.root / "artifacts" / key

    def scratch(self, key: str) -> Path:
        """The folder that survives an interrupted build of this artifact."""
        path = self.root / "scratch" / key
        with self._writing():
            path.mkdir(exist_ok=True)
        return path

    def recipe(self, key: str) -> Recipe | None:
        """The verified recipe of an artifact; `None` if there is no such artifact.

        Raises:
            ArtifactCorrupt: a file is missing, does not match its checksum, or belongs to another artifact.
        """
        folder = self.folder(key)
        if not os.path.lexists(folder):
            return None
        recipe = unseal(folder / "manifest.json", key, Recipe)
        for name, expected in recipe.files.items():
            actual = _sha256(folder / name)
            if actual != expected:
                raise ArtifactCorrupt(f"{folder / name}: sha256 is {actual[:12]}, the manifest says {expected[:12]}")
        return recipe

    def measurement(self, key: str) -> Measurement | None:
        """Answers and size as measured last; `None` if never measured.

        Raises:
            ArtifactCorrupt: the document is damaged, or belongs to another artifact.
        """
        return _found(self.folder(key) / "quality.json", key, Measurement)

    def manifest(self, key: str, benchmark: BenchmarkSet, score_digest: str = "") -> Manifest | None:
        """Recipe, answers and speed together; `None` unless all are there and, if that can be mended, of one machine.

        Answers that were scored in another way than by the score of this digest do not count.

        Raises:
            ArtifactCorrupt: something is damaged.
        """
        recipe, measured, timed = self.recipe(key), self.measurement(key), benchmark.results.get(key)
        if recipe is None or measured is None or timed is None or measured.score_digest != score_digest:
            return None
        if self.writable and (measured.cpu, measured.threads) != (benchmark.cpu, benchmark.threads):
            return None
        quality = Quality.model_validate(measured.fidelity.model_dump() | _speed(key, benchmark))
        machine = {"cpu": benchmark.cpu, "threads": benchmark.threads}
        change = _change(recipe, benchmark)
        return Manifest(**recipe.model_dump(), quality=quality, **machine, ratios=timed.ratios, change=change)

    def benchmark(self, key: str, anchor: str, cpu: str, threads: int) -> BenchmarkResult | None:
        """How fast an artifact is beside the anchor on a machine; `None` if it was not timed there.

        Raises:
            ArtifactCorrupt: the document is damaged, or belongs to something else.
        """
        path = self._benchmark(key, anchor, cpu, threads)
        return _found(path, path.name, BenchmarkResult)

    def lane_rates(self, key: str, cpu: str, threads: int) -> LaneRates | None:
        """What lanes bring an artifact on a machine; `None` if that was not measured there.

        Raises:
            ArtifactCorrupt: as `benchmark`.
        """
        path = self._lane_rates(key, cpu, threads)
        return _found(path, path.name, LaneRates)

    def machines(self, anchor: str) -> list[tuple[str, int]]:
        """CPU and threads of every machine on which the anchor was timed, as far as that is intact."""
        found = []
        for path in sorted((self.root / "benchmarks").glob(f"{anchor}.*")):
            with suppress(ArtifactCorrupt):
                result = unseal(path, path.name, BenchmarkResult)
                if result.anchor == anchor:
                    found.append((result.cpu, result.threads))
        return found

    def keep_benchmark(self, result: BenchmarkResult) -> None:
        """Store the speed of an artifact; call it under the lock `benchmark`.

        Raises:
            PassFailed: it holds a number that JSON does not have.
        """
        path = self._benchmark(result.key, result.anchor, result.cpu, result.threads)
        self._keep(path, path.name, result, "benchmark")

    def keep_lane_rates(self, measured: LaneRates) -> None:
        """Store what lanes bring an artifact. Lock and error as for `keep_benchmark`."""
        path = self._lane_rates(measured.key, measured.cpu, measured.threads)
        self._keep(path, path.name, measured, "benchmark")

    def failure(self, key: str) -> Failure | None:
        """Why the artifact cannot be made, if that was tried; a damaged note counts as none, and it is tried again."""
        with suppress(ArtifactCorrupt):
            return _found(self.root / "failures" / key, key, Failure)
        return None

    def keep_failure(self, key: str, failure: Failure) -> None:
        """Store why an artifact cannot be made."""
        self._keep(self.root / "failures" / key, key, failure, key)

    def ancestry(self, key: str) -> tuple[Recipe, ...]:
        """The verified recipes of all that `key` is made of, each once, in building order: the base first, `key` last.

        Raises:
            ArtifactCorrupt: one of them is missing or damaged.
        """
        found: dict[str, Recipe] = {}
        self._visit(key, found)
        return tuple(found.values())

    def _visit(self, key: str, found: dict[str, Recipe]) -> None:
        """Add what is not found yet of the ancestry, parents first."""
        recipe = self.recipe(key)
        if recipe is None:
            raise ArtifactCorrupt(f"{self.folder(key)}: the artifact is missing")
        for parent in recipe.parents:
            if parent not in found:
                self._visit(parent, found)
        found[key] = recipe

    def holder(self, key: str) -> Recipe:
        """The recipe of the artifact that has the model of this one: itself, or one before load passes.

        Raises:
            ArtifactCorrupt: as `ancestry`.
        """
        return next(recipe for recipe in reversed(self.ancestry(key)) if recipe.format is not None)

    def format_of(self, key: str) -> Format[Any]:
        """The format of the model of an artifact. Raises `ArtifactCorrupt` as `ancestry`."""
        return format_named(str(self.holder(key).format))

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the right to make this artifact; waits for another builder, which may be another process."""
        with self._writing():
            descriptor = self._open_lock(key)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def workspace(self, key: str) -> Iterator[Path]:
        """A temporary folder for the artifact's files; call under `lock`. Leftovers of killed builders are removed."""
        for stale in (self.root / "tmp").glob(f"{key}.*"):
            _remove(stale)
        folder = self._temporary(key)
        try:
            with self._writing():
                folder.mkdir()
                yield folder
        finally:
            _remove(folder)

    def publish(self, folder: Path, recipe: Recipe) -> None:
        """Seal the files in `folder` with the manifest and move them into place atomically.

        Raises:
            PassFailed: the recipe holds a number that JSON does not have.
        """
        with self._writing():
            for path in folder.rglob("*"):
                _open_as(path, folder)
                _flush(path)
            _seal(folder / "manifest.json", recipe.key, recipe)
            _flush(folder)
            folder.rename(self.folder(recipe.key))
            _flush(self.root / "artifacts")
            _remove(self.root / "scratch" / recipe.key)

    def attach(self, key: str, measurement: Measurement) -> None:
        """Store (or replace) the measurement of a published artifact; call it under the artifact's lock.

        Raises:
            PassFailed: it holds a number that JSON does not have.
        """
        self._keep(self.folder(key) / "quality.json", key, measurement, key)

    def discard(self, key: str) -> None:
        """Remove a damaged artifact; it is renamed first, so that nobody sees it half-removed."""
        with self._writing():
            self._bury(self.folder(key), key)

    def sweep(self) -> None:
        """Remove what dead builders left behind: temporary files whose lock is free, checkpoints of finished passes
        and those that nobody went on from for a month."""
        if not self.writable:
            return
        with self._writing():
            for stale in (self.root / "tmp").iterdir():
                if self._is_free(stale.name.partition(".")[0]):
                    _remove(stale)
            for stale in (self.root / "scratch").iterdir():
                finished = self.folder(stale.name).exists() or _age_s(stale) > ABANDONED_S
                if finished and self._is_free(stale.name):
                    _remove(stale)

    def _benchmark(self, key: str, anchor: str, cpu: str, threads: int) -> Path:
        return self.root / "benchmarks" / f"{key}.{_digest([anchor, cpu, str(threads)])}"

    def _lane_rates(self, key: str, cpu: str, threads: int) -> Path:
        return self.root / "benchmarks" / f"lanes-{key}.{_digest([cpu, str(threads)])}"

    def _keep(self, path: Path, key: str, document: BaseModel, lock: str) -> None:
        """Put a document in its place in one step, whatever stands there."""
        half = self._temporary(lock)
        with self._writing():
            try:
                _seal(half, key, document)
                if path.is_dir():
                    self._bury(path, lock)
                half.replace(path)
            finally:
                half.unlink(missing_ok=True)

    def _temporary(self, lock: str) -> Path:
        """A name that nobody else uses, for whoever holds this lock."""
        return self.root / "tmp" / f"{lock}.{secrets.token_hex(8)}"

    def _bury(self, path: Path, lock: str) -> None:
        grave = self._temporary(lock)
        path.rename(grave)
        _remove(grave)

    def _open_lock(self, key: str) -> int:
        return os.open(self.root / "locks" / key, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)

    def _is_free(self, key: str) -> bool:
        try:
            descriptor = self._open_lock(key)
        except OSError:  # something else stands in its place, or it is another user's
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            return True
        finally:
            os.close(descriptor)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What the disk refuses ends the command with one line."""
        try:
            yield
        except OSError as error:
            raise StartupError(
                f"cache folder {self.root}: cannot be written ({error}); make room, or set 'cache' or LEANSERVE_CACHE"
            ) from error


def _speed(key: str, benchmark: BenchmarkSet) -> dict[str, Any]:
    """The fields of `Quality` that are measured beside the base."""
    timed, gain = benchmark.results[key], benchmark.speedup(key)
    return {
        "latency_ms": benchmark.latency_ms(key),
        "throughput": benchmark.throughput(key),
        "speedup": gain.median,
        "speedup_low": gain.low,
        "speedup_high": gain.high,
        "rounds": timed.rounds,
        "waited": timed.waited,
    }


def _change(recipe: Recipe, benchmark: BenchmarkSet) -> Change | None:
    """What the last pass brought; `None` of one that has no parent, or several, or one that was not timed."""
    if len(recipe.parents) != 1 or recipe.parents[0] not in benchmark.results:
        return None
    return benchmark.speedup(recipe.key).over(benchmark.speedup(recipe.parents[0])).change


def checksums(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder and in those below, by its place there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in files}


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise ArtifactCorrupt(f"{path}: cannot be read ({error.strerror})") from error


def _found(path: Path, key: str, kind: type[Document]) -> Document | None:
    return unseal(path, key, kind) if os.path.lexists(path) else None


def _seal(path: Path, key: str, document: BaseModel) -> None:
    try:
        seal(path, key, document)
    except ValueError as error:
        raise PassFailed(f"what was found out about it cannot be stored: {error}") from error


def _digest(words: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def _age_s(folder: Path) -> float:
    """Seconds since anything in a folder was written."""
    written = [path.lstat().st_mtime for path in (folder, *folder.rglob("*"))]
    return time.time() - max(written)


def _remove(path: Path) -> None:
    """Remove a folder or a file, as far as possible; neither is where others look for it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _open_as(path: Path, folder: Path) -> None:
    """Have a file read by whoever may read the folder, as the builder's umask has it; some writers allow only the owner
    (safetensors), and a cache is built by one user and served by another."""
    if not path.is_dir():
        path.chmod(folder.stat().st_mode & 0o666)


def _flush(path: Path) -> None:
    """Ask the disk to keep a file or folder, so that a power cut after the rename cannot leave it empty."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
