"""From a variant's queue to the device and back: who comes for the next batch, when, and what is done with it.

    take -> assemble -> run -> split -> complete

is one round, on a lane that takes its batch in the moment it can run it, and wakes the event loop once afterwards.
Whose round is next is for the device to say (`runtime/turns.py`). Around it are policies, each of them called in one
line that can be removed, for what it brings (docs/measurements/policies.md): `short_batches.py`, `wide_lanes.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from leanserve.runtime.device import BatchOnLane, Lane
from leanserve.runtime.turns import DeviceShare
from leanserve.serving.batch_runner import BatchPlace, BatchRunner, CompletedBatch, PendingResult, Timed, count_rows
from leanserve.serving.batcher import Batcher, Formed, Ticket
from leanserve.serving.short_batches import ShortBatches
from leanserve.serving.wide_lanes import WideLanes


class CompletedRound(NamedTuple):
    """What was taken from the queue at that time, and what became of it."""

    lane: Lane
    formed: Formed[PendingResult]
    taken: float
    batches: list[CompletedBatch]


class Scheduler:
    """Sees to it that what waits in one queue is run. All but the lanes' own methods belong to the loop's thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        runner: BatchRunner,
        batcher: Batcher[PendingResult],
        share: DeviceShare,
        complete: Callable[[CompletedRound], None],
        *,
        lanes_only: bool = False,
    ) -> None:
        """`complete` is called on the loop, once per round; `share` is what the variant has of its device.

        `lanes_only`: the loop runs no batch itself, however short.
        """
        self._loop = loop
        self._batcher = batcher
        self._share = share
        self._complete = complete
        self._lanes_only = lanes_only
        self._gathering: asyncio.TimerHandle | None = None
        self.reopen(runner)

    def reopen(self, runner: BatchRunner) -> None:
        """Go on with backends that were loaded anew; nothing is queued or run meanwhile."""
        running = runner.running
        self._runner = runner
        self._device = running.device
        self._short = ShortBatches(running, self._share, self.turn_s, lanes_only=self._lanes_only)
        self._wide = WideLanes(running)

    def offered(self, *, unclaimed: bool) -> None:
        """Something was queued, and nobody is on the way for it if that is `unclaimed`."""
        if unclaimed:
            self._summon()
        elif self._gathering is not None and not self._pause():
            self._gathering.cancel()
            self._begin()

    def turn_s(self) -> float:
        """Predicted seconds of one lane for one batch of the queue, the costliest if their lengths differ."""
        return self._runner.running.costs.turn_seconds(self._batcher.rows_by_length(self._batcher.limits.levels))

    def _summon(self) -> None:
        """See to it that a lane comes for the queue: now, or when enough have come or were waited for."""
        pause = self._batcher.limits.max_delay_s and self._pause()
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
        """Seconds for which it is worth waiting for company, by `max_delay_s`."""
        return self._batcher.due(time.perf_counter())

    def _begin(self) -> None:
        """Run the next batch here if it is short and a lane is free; else have a lane come for it."""
        self._gathering = None
        lane = self._short.borrow()
        if lane is None:
            self._device.post(self._come, self._share)
            return
        try:
            self._complete(self._round(lane, self._summon))
        finally:
            self._device.give_back(lane)

    def _come(self, lane: Lane) -> None:
        """On a lane: one round."""
        self._device.seat(lane, seated=self._runner.running.seated)
        self._tell(self._complete, self._round(lane, self._go_on))

    def _go_on(self) -> None:
        """On a lane that has yet to run what it took: have any lane come for the rest, when it is its turn."""
        if self._batcher.limits.max_delay_s == 0:
            self._device.post(self._come, self._share)
        else:
            self._tell(self._summon)

    def _tell(self, callback: Callable[..., object], *arguments: object) -> None:
        """From a lane: have the loop call this."""
        self._loop.call_soon_threadsafe(callback, *arguments)

    def _round(self, lane: Lane, go_on: Callable[[], object]) -> CompletedRound:
        """Take a batch, see to it that somebody will `go_on` if there is more, and run it."""
        taken = time.perf_counter()
        formed = self._batcher.take(taken)
        if formed.more:
            go_on()
        batches: list[CompletedBatch] = []
        if formed.batch:
            place = self._wide.place(lane, formed.batch, taken)
            batches = self._run(place, BatchOnLane(self._share, formed), taken, formed.batch)
        return CompletedRound(lane, formed, taken, batches)

    def _run(
        self, place: BatchPlace, whole: BatchOnLane, taken: float, tickets: list[Ticket[PendingResult]]
    ) -> list[CompletedBatch]:
        """Assemble, run and split a batch; where it fails, again in parts, which is when there are several. Never
        raises."""
        runner, device = self._runner, self._device
        try:
            batch, padded = runner.assemble(tickets, place)
            costs = place.way.costs.tables[tickets[0].bucket]
            started, expected_s = time.perf_counter(), costs.seconds(padded)
            device.begin(place.lanes, whole, expected_s, started)
            try:
                outputs, facts = place.way.backend.run(batch)
            finally:
                ended = time.perf_counter()
                device.end(place.lanes, whole, ended - started - expected_s)
            replies = runner.split(outputs, tickets, padded)
        except BaseException as error:  # a panic in a native library is no Exception, and these clients wait
            return runner.run_apart(error, tickets, place, partial(self._run, place, whole, taken))
        timed = Timed(taken, started, ended, time.perf_counter(), padded, len(place.lanes), costs, facts)
        return [CompletedBatch(tickets, replies, count_rows(tickets), ended - started, timed)]
