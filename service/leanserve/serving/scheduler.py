"""From a variant's queue to the device and back: who comes for the next batch, when, and how much of the queue goes.

A lane takes a batch in the moment it can run it, and wakes the event loop once per batch. Batches of microseconds are
run by the loop itself, in the part of a free lane (docs/decisions/008-short-batches.md).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

from leanserve.contracts import Arrays
from leanserve.runtime.device import Afterwards, Lane
from leanserve.runtime.lanes import LoadedVariant
from leanserve.runtime.linux.loop_waker import LoopWaker
from leanserve.serving.batch_runner import BatchRunner, CompletedBatch, PendingResult
from leanserve.serving.batcher import Batcher, Formed, Portion
from leanserve.serving.cohort import Cohort
from leanserve.serving.deferred_metrics import DeferredMetrics
from leanserve.serving.prefetcher import Prefetcher

SHORT_S, LONG_S = 50e-6, 300e-6
"""The loop itself runs a variant whose largest batch took no longer at warm-up, until it turns out to take much longer:
to wake a lane and be woken by it costs about as much."""
Settle = Callable[[Formed[PendingResult], list[CompletedBatch], float], None]


class Scheduler:
    """Sees to it that what waits in one queue is run. All but the lanes' own methods belong to the loop's thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        running: LoadedVariant,
        execution: BatchRunner,
        batcher: Batcher[PendingResult],
        settle: Settle,
        tally: DeferredMetrics,
    ) -> None:
        """`settle` is called on the loop, once per batch, with what was taken, what became of it, and when it began."""
        self._loop = loop
        self._waker = LoopWaker(loop)
        self._running = running
        self._execution = execution
        self._batcher = batcher
        self._settle = settle
        self._tally = tally
        # Decided by the warm-up, once: what is learnt beside a busy loop, or loaded anew, does not take it back.
        self._short = all(table.seconds(table.knee) <= SHORT_S for table in running.costs.tables)
        self._cohort = Cohort(batcher.limits.max_rows)
        self._gathering: asyncio.TimerHandle | None = None
        self._ahead = Prefetcher(running, execution, batcher)

    def reopen(self, running: LoadedVariant, execution: BatchRunner) -> None:
        """Go on with backends that were loaded anew; nothing is queued or run meanwhile."""
        self._running = running
        self._execution = execution
        self._ahead = Prefetcher(running, execution, self._batcher)

    def offered(self, *, unclaimed: bool) -> None:
        """Something was queued, and nobody is on the way for it if that is `unclaimed`."""
        if unclaimed:
            self._summon()
        elif self._gathering is not None and not self._pause():
            self._gathering.cancel()
            self._begin()
        else:
            self._ahead.look()

    def turn_s(self) -> float:
        """Predicted seconds of one lane for one batch of the queue, the costliest if their lengths differ."""
        return self._running.costs.turn_seconds(self._batcher.rows_by_length(self._batcher.limits.levels))

    def _summon(self) -> None:
        """See to it that a lane comes for the queue: now, or when enough have come or were waited for."""
        pause = self._pause()
        if pause:
            self._gathering = self._loop.call_later(pause, self._begin)
        else:
            self._loop.call_soon(self._gather, self._batcher.waiting_rows)

    def _gather(self, rows: int) -> None:
        """Begin once a turn of the loop has added none to so many waiting rows: what arrives together makes one batch.

        To read the others is the loop's work anyway, and a batch costs it far more than another turn.
        """
        waiting = self._batcher.waiting_rows
        if rows < waiting < self._batcher.limits.max_rows:
            self._loop.call_soon(self._gather, waiting)
        else:
            self._begin()

    def _pause(self) -> float:
        """Seconds for which it is worth waiting for company: `max_delay_s`, and until a group is together again."""
        now = time.perf_counter()
        return max(self._batcher.due(now), self._cohort.pause(self._batcher.waiting_rows, now))

    def _begin(self) -> None:
        """Run the next batch here if it is short and a lane is free; else have a lane come for it."""
        self._gathering = None
        device = self._running.device
        lane = device.borrow() if self._short and self.turn_s() <= LONG_S else None
        if lane is None:
            device.post(self._run_next)
            return
        try:
            formed, taken, joined = self._take()
            if formed.more:
                self._summon()
            batches = self._execution.run(lane, formed.batch, taken, joined)
        finally:
            lane.held.release()
        self._done(formed, batches, taken)

    def _run_next(self, lane: Lane) -> Afterwards:
        """On a lane: form a batch, have the next lane come for what is left, run it; wake the loop once, afterwards.

        But where this lane, or another, has just answered a group that will ask again, the loop waits for it first:
        taken alone, a few that came between would keep the group waiting, and stay apart from it ever after.
        """
        if self._cohort.pause(self._batcher.waiting_rows, time.perf_counter()):
            return partial(self._tell, lane, self._summon)
        device = self._running.device
        portion = self._execution.portion if len(device.lanes) > 1 else None
        formed, taken, joined = self._take(portion)
        if formed.more and self._batcher.limits.max_delay_s == 0:
            device.post(self._go_on)
        elif formed.more:
            self._tell(lane, self._summon)
        if formed.more:
            self._ahead.look()
        batches = self._execution.run(lane, formed.batch, taken, joined)
        if len(batches) == 1:
            self._cohort.answered(batches[0], self._batcher.waiting_rows, time.perf_counter())
        return partial(self._tell, lane, self._done, formed, batches, taken)

    def _take(self, portion: Portion | None = None) -> tuple[Formed[PendingResult], float, Arrays | None]:
        """The next batch, when it was taken, and the rows of it if they were joined ahead."""
        formed = self._batcher.take(time.perf_counter(), portion)
        return formed, time.perf_counter(), self._ahead.taken(formed.batch)

    def _go_on(self, lane: Lane) -> Afterwards | None:
        """On a lane: run the next batch of a queue that has just had its turn, but let the others have theirs first.

        This was posted before the batch of that turn was run, for any lane that would be idle otherwise; a neighbour
        whose request arrived since has waited longer for a turn.
        """
        device = self._running.device
        if device.waiting():
            device.post(self._run_next)
            return None
        return self._run_next(lane)

    def _tell(self, lane: Lane, callback: Callable[..., object], *arguments: object) -> None:
        """From a lane: have the loop call this, without disturbing other lanes that work."""
        if self._running.device.others_work(lane):
            self._waker.wake_by_pipe(callback, *arguments)
        else:  # any core will do, and another one than that of this lane is quicker
            self._waker.wake_threadsafe(callback, *arguments)

    def _done(self, formed: Formed[PendingResult], batches: list[CompletedBatch], taken: float) -> None:
        """Once per batch: hand out the outcomes, and remember what is to be counted."""
        self._settle(formed, batches, taken)
        self._tally.add(batches)
