"""What a search has found out so far, on disk: one that was interrupted goes on from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from leanserve.contracts import Json


class Notes:
    """A file of what is known, by key."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Json] = {}
        if path.exists():
            self._known = json.loads(path.read_text(encoding="utf-8"))

    def once(self, key: str, find: Callable[[], Json]) -> Json:
        """What is known under a key, else what `find` gives, which is written down."""
        if key not in self._known:
            self._known[key] = find()
            fresh = self._path.with_suffix(".new")
            fresh.write_text(json.dumps(self._known), encoding="utf-8")
            fresh.replace(self._path)
        return self._known[key]
