"""Requests are refused when their deadline passes, also while the lanes are held up by a slow batch.

One timer per variant, at the earliest known deadline; most of the time it stands already.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

REST = 20
"""A sweep looks at the whole queue. From one to the next are this many times as long as it took, hence no more than a
twentieth of the loop: 10,000 deadlines that pass within a second cost 0.05 s of it instead of 0.7 s."""


class ExpiryTimer:
    """Calls `sweep(now)`, which returns the next deadline (seconds of `time.perf_counter`, inf for none), in time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sweep: Callable[[float], float]) -> None:
        self._loop = loop
        self._sweep = sweep
        self._timer: asyncio.TimerHandle | None = None
        self._next_at = math.inf
        self._rested_at = 0.0

    def by(self, deadline: float) -> None:
        """See to it that there is a sweep at this deadline, or as soon as the last one allows it."""
        due_at = max(deadline, self._rested_at)
        if due_at >= self._next_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._next_at = due_at
        self._timer = self._loop.call_later(due_at - time.perf_counter(), self._run)

    def _run(self) -> None:
        started = time.perf_counter()
        deadline = self._sweep(started)
        self._next_at = math.inf
        self._rested_at = started + REST * (time.perf_counter() - started)
        self.by(deadline)
