"""The next batch, joined while the lanes are busy: one at most, and only where that is worth a thread.

Nothing is decided ahead. The tickets stay in the queue, where they still may expire, lose their client or be overtaken.
A lane forms its batch as late as ever, and if it consists of the very tickets that were joined, finds that done.
docs/decisions/001-late-binding-on-the-device-thread.md has what it brings, and where it would cost.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from leanserve.contracts import Arrays
from leanserve.runtime.lanes import LoadedVariant
from leanserve.serving.batch_runner import BatchRunner, PendingResult
from leanserve.serving.batcher import Batcher, Ticket

WORTH_BYTES = 2**19
"""Smaller batches are joined in the time that it takes to wake a thread."""


class Joined(NamedTuple):
    """Tickets that still wait, and the rows of all of them."""

    tickets: list[Ticket[PendingResult]]
    rows: Arrays


class Prefetcher:
    """Keeps the next batch of one variant ready, if a core is to be had for it.

    Where the lanes fill all cores, whoever joins ahead takes from them as much as it gives.
    """

    def __init__(self, running: LoadedVariant, execution: BatchRunner, batcher: Batcher[PendingResult]) -> None:
        self._device = running.device
        self._execution = execution
        self._batcher = batcher
        limits = batcher.limits
        spare = running.device.spare or running.backends[0].device != "cpu"
        self._worth = spare and execution.row_bytes * limits.max_rows >= WORTH_BYTES
        self._full = min(limits.rows_at, default=limits.max_rows)
        self._asked = False
        self._joined: Joined | None = None
        self._turn = object()

    def look(self) -> None:
        """Something was queued or taken: have the next batch joined if it is full and no lane is free to take it."""
        if self._worth and not self._asked and self._batcher.waiting_rows >= self._full and self._device.busy():
            self._asked = True
            self._device.aside(self._join)

    def taken(self, tickets: list[Ticket[PendingResult]]) -> Arrays | None:
        """These were taken; their rows, if they are what was joined."""
        self._turn = object()
        joined, self._joined, self._asked = self._joined, None, False
        return joined.rows if joined is not None and joined.tickets == tickets else None

    def _join(self) -> None:
        turn = self._turn
        tickets = self._batcher.next_full(time.perf_counter())
        if tickets:
            self._joined = Joined(tickets, self._execution.join(tickets))
        else:
            self._asked = False
        if turn is not self._turn:
            self._joined = None  # too late, and nobody else would let go of it
