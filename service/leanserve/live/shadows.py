"""Batches of the base that wait to be answered again: in idle time, a little of it, and dropped where there is none.

Both variants run the same batch, the base once more and the candidate, one after the other in an order that is drawn:
so their times differ by nothing but the variants. Each run waits for a moment in which all lanes are idle and nobody
waits, and between two runs passes as long as keeps them within their part of the device's time. A request that comes
during a run waits for its rest at most; how many do is bounded by that part.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from leanserve.live.rerun import AnsweredRequest, Rerun, rerun
from leanserve.runtime.device import Lane
from leanserve.serving.batch_runner import CompletedBatch
from leanserve.serving.fleet import Fleet
from leanserve.serving.variant import Variant

SOON_S, LATE_S = 0.002, 0.064
"""How soon it is looked again for an idle moment: twice as late each time."""


class ShadowLimits(NamedTuple):
    """The share of batches that are taken, the most of the device's time, and what may wait."""

    share: float
    time: float
    rows: int
    nbytes: int


class AnsweredAgain(NamedTuple):
    """A batch of the base, and what both variants made of it in idle time."""

    requests: Sequence[AnsweredRequest]
    base: Rerun
    candidate: Rerun


@dataclass(slots=True)
class _Waiting:
    requests: list[AnsweredRequest]
    rows: int
    nbytes: int
    left: list[str]
    """The variants that are still to run it, the next one last."""
    made: dict[str, Rerun] = field(default_factory=dict)


class Shadows:
    """The bounded queue of one experiment. On the event loop only.

    `outcomes` counts batches: `compared`, or dropped, because the service was `busy`, the queue `full`, or a variant
    could not run them (`unfit`). `spent_s` is what the runs took of the device.
    """

    def __init__(
        self, fleet: Fleet, arms: tuple[str, str], limits: ShadowLimits, done: Callable[[AnsweredAgain], None]
    ) -> None:
        """`arms` are base and candidate."""
        self.outcomes: Counter[str] = Counter(dict.fromkeys(("compared", "busy", "full", "unfit"), 0))
        self.spent_s = 0.0
        self.since = time.monotonic()
        self._fleet = fleet
        self._base, self._candidate = arms
        self._limits = limits
        self._done = done
        self._queue: deque[_Waiting] = deque()
        self._rows = self._nbytes = 0
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._pause_s = SOON_S
        self._next_at = 0.0
        self._running = self._closed = False

    @property
    def waiting(self) -> int:
        """Batches."""
        return len(self._queue)

    def offer(self, batches: Sequence[CompletedBatch]) -> None:
        """Take what the base has answered, where there is room and time for it."""
        for batch in batches:
            if batch.timed is None or random.random() >= self._limits.share:
                continue
            outcome = self._refusal(batch) or self._add(_answered(batch))
            if outcome:
                self.outcomes[outcome] += 1

    def close(self) -> None:
        """Drop what waits. A run that goes on is nobody's any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._queue.clear()

    def _refusal(self, batch: CompletedBatch) -> str:
        if any(variant.batcher.waiting_rows for variant in self._fleet.variants.values()):
            return "busy"
        candidate = self._fleet.variants.get(self._candidate)
        return "unfit" if candidate is None or not _fits(candidate, batch) else ""

    def _add(self, requests: list[AnsweredRequest]) -> str:
        rows, nbytes = (sum(getattr(each, name) for each in requests) for name in ("rows", "nbytes"))
        if self._rows + rows > self._limits.rows or self._nbytes + nbytes > self._limits.nbytes:
            return "full"
        arms = [self._base, self._candidate]
        random.shuffle(arms)
        self._queue.append(_Waiting(requests, rows, nbytes, arms))
        self._rows += rows
        self._nbytes += nbytes
        self._wake()
        return ""

    def _wake(self) -> None:
        """See to it that the next run begins, not before its time."""
        if self._queue and self._timer is None and not self._running and not self._closed:
            left_s = self._next_at - time.perf_counter()
            self._timer = self._loop.call_later(max(self._pause_s, left_s), self._try)

    def _try(self) -> None:
        self._timer = None
        waiting = self._queue[0]
        variant = self._fleet.variants.get(waiting.left[-1])
        if variant is None:
            self._drop("unfit")
        elif self._begin(waiting, variant):
            return
        else:
            self._pause_s = min(LATE_S, 2 * self._pause_s)
        self._wake()

    def _begin(self, waiting: _Waiting, variant: Variant) -> bool:
        """Run it now, if nobody waits and all lanes are idle."""
        if any(other.batcher.waiting_rows for other in self._fleet.variants.values()):
            return False
        release = variant.in_use()
        self._running = self._fleet.device.post_idle(partial(self._on_lane, waiting, variant, release))
        if not self._running:
            release()
        return self._running

    def _on_lane(self, waiting: _Waiting, variant: Variant, release: Callable[[], None], lane: Lane) -> None:
        began = time.perf_counter()
        made = rerun(variant, lane, waiting.requests)
        took = time.perf_counter() - began
        with suppress(RuntimeError):  # the loop was closed meanwhile
            self._loop.call_soon_threadsafe(self._ran, waiting, variant.name, made, took, release)

    def _ran(self, waiting: _Waiting, name: str, made: Rerun, took: float, release: Callable[[], None]) -> None:
        release()
        self._running = False
        self.spent_s += took
        self._pause_s = SOON_S
        self._next_at = time.perf_counter() + took * (1 / self._limits.time - 1)
        if self._closed:
            return
        waiting.made[name] = made
        waiting.left.pop()
        if not waiting.left:
            self._drop("compared")
            self._done(AnsweredAgain(waiting.requests, waiting.made[self._base], waiting.made[self._candidate]))
        self._wake()

    def _drop(self, outcome: str) -> None:
        waiting = self._queue.popleft()
        self._rows -= waiting.rows
        self._nbytes -= waiting.nbytes
        self.outcomes[outcome] += 1

    @property
    def time_share(self) -> float:
        """Of the device's time, what the runs had so far."""
        passed = time.monotonic() - self.since
        return self.spent_s / passed if passed else 0.0

    def counts(self) -> Mapping[str, int]:
        """Batches by outcome, so far."""
        return dict(self.outcomes)


def _fits(candidate: Variant, batch: CompletedBatch) -> bool:
    """Whether it runs as many rows at once, so that both variants run the same batch."""
    limits = candidate.batcher.limits
    bucket = limits.bucket(max(ticket.length for ticket in batch.tickets))
    return batch.rows <= max(limits.rows_per_batch(bucket), 1)


def _answered(batch: CompletedBatch) -> list[AnsweredRequest]:
    """The requests of a batch that were answered."""
    return [
        AnsweredRequest(ticket.sample, outcome, ticket.length, ticket.identity)
        for ticket, outcome in zip(batch.tickets, batch.outcomes, strict=True)
        if not isinstance(outcome, Exception)
    ]
