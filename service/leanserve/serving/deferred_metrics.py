"""What was run is counted, into the metrics and into what batches cost: a moment later, many batches at a time.

After a batch of milliseconds has had the core's caches, counting it takes 0.15 ms, and a lone client who asks again at
once waits for that. A dozen batches take hardly longer than one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

from leanserve.serving.batch_runner import CompletedBatch, PendingResult, Timed
from leanserve.serving.batcher import Ticket
from leanserve.telemetry.observations import VariantMetrics

LATER_S, MOST = 0.05, 16
"""How long batches wait to be counted, and how many of them."""
LEARNT_S = 1.0
"""How often it is told that there was something to learn, at most."""


class Record(NamedTuple):
    """What is counted of a batch; its tickets, with all that their requests hold, are not kept."""

    rows: int
    infer_s: float
    timed: Timed
    queue_seconds: list[float]
    padding_tokens: int


class DeferredMetrics:
    """Counts the batches of one variant. All on the event loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, metrics: VariantMetrics, learnt: Callable[[], object] = bool
    ) -> None:
        """`learnt` is called now and then, after costs have been corrected by what was run."""
        self._loop = loop
        self._learnt = learnt
        self._learnt_at = loop.time()
        self._metrics = metrics
        self._records: list[Record] = []
        self._due = False

    def add(self, batches: Sequence[CompletedBatch]) -> None:
        """Count these, now or before long. What failed is not counted."""
        self._records += [_record(batch, batch.timed) for batch in batches if batch.timed is not None]
        if len(self._records) >= MOST:
            self.catch_up()
        elif self._records and not self._due:
            self._due = True
            self._loop.call_later(LATER_S, self._later)

    def catch_up(self) -> None:
        """Count all that was added."""
        records, self._records = self._records, []
        for record in records:
            self._count(record)
        if records and (now := self._loop.time()) >= self._learnt_at + LEARNT_S:
            self._learnt_at = now
            self._learnt()

    def _count(self, record: Record) -> None:
        rows, infer_s, timed, queue_seconds, padding = record
        metrics = self._metrics
        timed.costs.observe(timed.padded, infer_s)
        metrics.padding_tokens += padding
        lane_s = infer_s * timed.lanes
        metrics.lane_s += lane_s
        metrics.cost.add(rows, lane_s / metrics.facts.lanes)
        if timed.facts:
            metrics.add_backend_facts(timed.facts)
        input_s, output_s = timed.started - timed.taken, timed.split - timed.ended
        metrics.batch_done(rows, timed.padded - rows, infer_s, queue_seconds, input_s, output_s)

    def _later(self) -> None:
        self._due = False
        self.catch_up()


def _record(batch: CompletedBatch, timed: Timed) -> Record:
    queue_seconds = [timed.taken - ticket.enqueued_at for ticket in batch.tickets]
    return Record(batch.rows, batch.infer_s, timed, queue_seconds, padding_tokens(batch.tickets))


def padding_tokens(tickets: list[Ticket[PendingResult]]) -> int:
    """Positions that are computed only because a row is shorter than the longest one of its batch."""
    if len(tickets) == 1 or not tickets[0].length:
        return 0
    longest = max(ticket.length for ticket in tickets)
    return sum(ticket.rows * (longest - ticket.length) for ticket in tickets)
