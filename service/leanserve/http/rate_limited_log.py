"""What a client causes again and again is logged once, and then counted: a flood of requests is no flood of lines."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

INTERVAL_S = 10.0
"""Seconds between two lines of one kind."""


class RateLimitedLog:
    """Warnings of a few kinds; of each kind the first one, and then at most one per interval."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._told_at: dict[str, float] = {}
        self._untold: dict[str, int] = {}

    def tell(self, kind: str, text: str) -> None:
        """Log the text, or only count it. Kinds are the program's own words, never a client's."""
        now = self._clock()
        if now - self._told_at.get(kind, -INTERVAL_S) < INTERVAL_S:
            self._untold[kind] = self._untold.get(kind, 0) + 1
            return
        self._told_at[kind] = now
        untold = self._untold.pop(kind, 0)
        self._logger.warning("%s%s", text, f" (and {untold} more like this before)" if untold else "")
