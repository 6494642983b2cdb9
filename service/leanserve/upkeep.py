"""`leanserve cache`: what is in an artifact store, what of it is damaged, what nobody needs any more.

Nothing here is needed for serving: whatever is missing or damaged is made again by the next build. Do not prune while
one is running, for it may be about to use what is removed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from leanserve.artifacts.benchmarks import BenchmarkResult, LaneRates
from leanserve.artifacts.manifest import Failure, Recipe
from leanserve.artifacts.sealed import unseal
from leanserve.artifacts.store import ArtifactStore
from leanserve.bases.description import FORMAT, Description
from leanserve.errors import ArtifactCorrupt

DAY_S = 86_400.0
LANES = "lanes-"


class StoredArtifact(NamedTuple):
    """An artifact as it lies in the store; `recipe` is `None` where it is damaged, and `fault` says how."""

    key: str
    recipe: Recipe | None
    bytes: int
    made_at: float
    """Seconds since the epoch."""
    fault: str = ""

    @property
    def words(self) -> str:
        """Of which base, and what was done last."""
        if self.recipe is None:
            return f"damaged: {self.fault}"
        return f"{self.recipe.base}: {self.recipe.kind or 'the base'}"

    @property
    def days(self) -> float:
        """Since it was made."""
        return (time.time() - self.made_at) / DAY_S


class Pruned(NamedTuple):
    """What was removed, or would be."""

    artifacts: tuple[StoredArtifact, ...]
    notes: tuple[Path, ...]
    """Benchmarks, failures and checkpoints of what is not there, descriptions in an older form."""

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.artifacts) + sum(_size(path) for path in self.notes)


def stored_artifacts(store: ArtifactStore) -> list[StoredArtifact]:
    """Every artifact, the newest first; each is verified."""
    found = [_stored(store, path) for path in (store.root / "artifacts").iterdir()]
    return sorted(found, key=lambda item: -item.made_at)


def faults(store: ArtifactStore) -> list[str]:
    """What in a store is damaged, of everything that is believed when it is read: artifacts, measurements, notes."""
    found = [f"artifact {item.key}: {item.fault}" for item in stored_artifacts(store) if item.fault]
    for path in (store.root / "benchmarks").iterdir():
        kind = LaneRates if path.name.startswith(LANES) else BenchmarkResult
        with _told(found):
            unseal(path, path.name, kind)
    for path in (store.root / "failures").iterdir():
        with _told(found):
            unseal(path, path.name, Failure)
    for path in _notes_on_bases(store):
        with _told(found):
            unseal(path, path.name.partition(".")[0], Description)
    return found


def prune(store: ArtifactStore, kept: Collection[str], older_than_s: float, *, dry_run: bool) -> Pruned:
    """Remove artifacts whose keys are not `kept` and that were made longer ago than that, and what belongs to them.

    What dead builders left behind goes in any case; a damaged artifact that is kept stays for the build to replace.
    """
    found = stored_artifacts(store)
    gone = tuple(item for item in found if item.key not in kept and time.time() - item.made_at >= older_than_s)
    there = {item.key for item in found} - {item.key for item in gone} | set(kept)
    pruned = Pruned(gone, tuple(_orphans(store, there)))
    if dry_run:
        return pruned
    for item in gone:
        with store.lock(item.key):
            store.discard(item.key)
    for path in pruned.notes:
        with suppress(OSError):
            path.unlink()
    store.sweep()
    return pruned


@contextmanager
def _told(found: list[str]) -> Iterator[None]:
    """Add what is wrong with a document to a list."""
    try:
        yield
    except ArtifactCorrupt as error:
        found.append(str(error))


def _stored(store: ArtifactStore, path: Path) -> StoredArtifact:
    size, made_at = _size(path), path.stat().st_mtime
    try:
        recipe = store.recipe(path.name)
        store.measurement(path.name)
    except ArtifactCorrupt as error:
        return StoredArtifact(path.name, None, size, made_at, str(error))
    return StoredArtifact(path.name, recipe, size, made_at)


def _orphans(store: ArtifactStore, there: Collection[str]) -> Iterator[Path]:
    """Notes on artifacts that are not there, and on bases in a form that is not read any more."""
    for folder in ("benchmarks", "failures"):
        for path in (store.root / folder).iterdir():
            if path.name.removeprefix(LANES).partition(".")[0] not in there:
                yield path
    yield from (path for path in (store.root / "bases").iterdir() if not path.name.endswith(f".{FORMAT}.json"))


def _notes_on_bases(store: ArtifactStore) -> Iterator[Path]:
    return (path for path in (store.root / "bases").iterdir() if path.name.endswith(f".{FORMAT}.json"))


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [Path(root) / name for root, _, names in os.walk(path) for name in names]
    with suppress(OSError):
        return sum(file.lstat().st_size for file in files)
    return 0
