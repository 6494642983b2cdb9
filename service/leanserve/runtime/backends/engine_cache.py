"""Engines that TensorRT has made, kept beside their graph with checksums: a damaged one is made again, and never run.

They come after the artifact was sealed, at the first batch of a shape, so that its manifest cannot speak of them; and
whoever makes one may be killed meanwhile. So a list of checksums is written, in one step, when they are whole, and
before a session is opened whatever does not match it is removed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

from leanserve.disk import sha256_of

logger = logging.getLogger(__name__)

SUMS = "checksums.json"
_State = Mapping[str, tuple[int, int]]
"""Name -> size, and nanoseconds of the last change."""


class EngineCache:
    """A folder of engines; used by any number of threads at once."""

    def __init__(self, folder: Path) -> None:
        """Remove what the folder holds unless it is whole."""
        self._folder = folder
        self._lock = threading.Lock()
        if folder.exists() and not self._whole():
            logger.warning("%s: engines that are not as they were kept are made again, which takes minutes", folder)
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        self._kept = self._state()

    def keep(self) -> None:
        """Write down the checksums if engines have come or changed since; cheap where none has."""
        if self._state() == self._kept:
            return
        with self._lock:
            state = self._state()
            sums = {name: sha256_of(self._folder / name) for name in state}
            half = self._folder / f"{SUMS}.{os.getpid()}"
            half.write_text(json.dumps(sums), encoding="utf-8")
            half.replace(self._folder / SUMS)
            self._kept = state

    def _whole(self) -> bool:
        try:
            sums = json.loads((self._folder / SUMS).read_text(encoding="utf-8"))
            return bool(sums == {name: sha256_of(self._folder / name) for name in self._state()})
        except (OSError, ValueError):
            return not self._state()

    def _state(self) -> _State:
        found = {entry.name: entry.stat() for entry in os.scandir(self._folder) if not entry.name.startswith(SUMS)}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}
