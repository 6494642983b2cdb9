"""The bounded queue of one variant and the forming of its batches.

Late binding: a batch is formed by a lane of the device in the moment it is free to run it, so an idle lane adds no wait
and a busy device lets the batch grow. Rows are counted, not requests. What expired or lost its client is left out when
the batch is formed. No torch, no HTTP; the clock is an argument, so that a table of arrivals -> batches tests it.

The most urgent priority level goes first, within a level the oldest request. Nothing but its deadline keeps a less
urgent one from being overtaken again and again: no request waits longer than that. Rows of very different length do not
share a batch, for all would be padded to the longest: a batch holds one length bucket, that of the foremost ticket. Nor
do tickets of different company (`company.py`), which are few or as many as there are lengths.

Offers come from the event loop, `take` from the lanes; one lock, held for microseconds, keeps them apart. Somebody is
always on the way to `take` while anything waits, and never more than one (the *claim*).
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from leanserve.contracts import Arrays
from leanserve.errors import BadInput, QueueFull
from leanserve.request_identity import RequestIdentity


def _never_gone() -> bool:
    return False


Pending = TypeVar("Pending")


class Ticket(Generic[Pending]):
    """One request (or one part of a split request) waiting in a queue. Times are seconds of the caller's clock.

    `length` is the longest dynamic axis of its rows, 0 if there is none; the queue finds its length `bucket`. `level`
    is its priority from 1, the most urgent, to the `levels` of the queue. Only those of equal `company` share a batch.
    `identity` names the request in the log. `predicted_s` is the wait that it was told, 0 if none.
    """

    __slots__ = (
        "bucket",
        "company",
        "deadline",
        "enqueued_at",
        "identity",
        "is_disconnected",
        "length",
        "level",
        "predicted_s",
        "reply",
        "rows",
        "sample",
    )

    def __init__(
        self,
        sample: Arrays,
        reply: Pending,
        *,
        deadline: float = math.inf,
        is_disconnected: Callable[[], bool] = _never_gone,
        level: int = 1,
        length: int = 0,
    ) -> None:
        self.sample = sample
        self.rows = len(sample[0])
        self.reply = reply
        self.deadline = deadline
        self.is_disconnected = is_disconnected
        self.level = level
        self.length = length
        self.identity: RequestIdentity | None = None
        self.company: Hashable = ()
        self.bucket = 0
        self.enqueued_at = 0.0
        self.predicted_s = 0.0


@dataclass(slots=True)
class Formed(Generic[Pending]):
    """What `take` found: tickets to run together, and those that are not run because they expired or are unwanted."""

    batch: list[Ticket[Pending]]
    expired: list[Ticket[Pending]]
    left: list[Ticket[Pending]]
    more: bool = False
    """Others are waiting: whoever took this batch sees to it that the next one is taken, too."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Rows per batch, rows that may wait, the wait for company on an idle device, and the longest wait at all.

    Priorities are 1, the most urgent, to `levels`; requests that name none have `default_level`. Where the length of
    rows varies, `lengths` are the upper ends of the length buckets, ascending, and `rows_at` the rows per batch in each
    (`max_rows` is the largest of them).
    """

    max_rows: int
    queue_rows: int
    max_delay_s: float = 0.0
    timeout_s: float = 10.0
    levels: int = 1
    default_level: int = 1
    lengths: tuple[int, ...] = ()
    rows_at: tuple[int, ...] = ()

    def level(self, priority: int) -> int:
        """The level of a request's priority; 0 and what is beyond the last level mean the default, as in Triton."""
        return priority if 1 <= priority <= self.levels else self.default_level

    def bucket(self, length: int) -> int:
        """The position of the length bucket that holds this length, the last one for more; 0 if there are none."""
        return min(bisect_left(self.lengths, length), len(self.lengths) - 1) if self.lengths else 0

    def check(self, rows: int) -> None:
        """Raise `BadInput` for a request of more rows than may ever wait: to try again would not help."""
        if rows > self.queue_rows:
            most = f"the queue holds at most {self.queue_rows} (batch.queue_rows)"
            raise BadInput(f"the request has {rows} rows; {most}: send fewer at a time")

    def rows_per_batch(self, bucket: int) -> int:
        """The most rows in a batch of this length bucket."""
        return self.rows_at[bucket] if self.rows_at else self.max_rows


class Batcher(Generic[Pending]):
    """A bounded queue, first in first out within each priority level, that closes a batch as late as possible."""

    def __init__(self, limits: QueueLimits) -> None:
        self.limits = limits
        self.waiting_rows = 0
        self._waiting = 0
        buckets = range(max(1, len(limits.lengths)))
        self._queues: list[list[deque[Ticket[Pending]]]] = [[deque() for _ in buckets] for _ in range(limits.levels)]
        self._rows = [[0] * len(buckets) for _ in range(limits.levels)]
        self._lock = threading.Lock()
        self._claimed = False

    def offer(self, tickets: list[Ticket[Pending]], now: float) -> bool:
        """Queue all tickets or none. True if nobody is on the way to `take` yet, so that the caller has to see to it.

        Raises:
            QueueFull: the rows do not fit into the queue now. BadInput: they never will.
        """
        rows = sum([ticket.rows for ticket in tickets])
        limits = self.limits
        with self._lock:
            if self.waiting_rows + rows > limits.queue_rows:
                limits.check(rows)
                full = f"the queue holds {self.waiting_rows} of at most {limits.queue_rows} rows"
                raise QueueFull(f"{full}; {rows} more do not fit")
            for ticket in tickets:
                ticket.enqueued_at = now
                ticket.bucket = bucket = limits.bucket(ticket.length)
                self._queues[ticket.level - 1][bucket].append(ticket)
                self._rows[ticket.level - 1][bucket] += ticket.rows
            self._waiting += len(tickets)
            self.waiting_rows += rows
            unclaimed, self._claimed = not self._claimed, True
            return unclaimed

    def waiting_requests(self) -> int:
        """Tickets in the queue now."""
        return self._waiting

    def rows_before(self, level: int) -> int:
        """Waiting rows that go before a new request of this level: those of its own and of the more urgent ones."""
        return sum(self.rows_by_length(level))

    def rows_by_length(self, level: int) -> list[int]:
        """The same by length bucket."""
        if level == self.limits.levels and len(self._rows[0]) == 1:
            return [self.waiting_rows]
        return [sum(rows) for rows in zip(*self._rows[:level], strict=True)] if level > 1 else list(self._rows[0])

    def due(self, now: float) -> float:
        """Seconds until the next batch should be formed: 0 when it is full or has waited `max_delay_s`."""
        if self.limits.max_delay_s == 0:
            return 0.0
        with self._lock:
            rows = self.rows_by_length(self.limits.levels)
            if any(waiting >= self.limits.rows_per_batch(bucket) for bucket, waiting in enumerate(rows)):
                return 0.0
            oldest = (queue[0].enqueued_at for queues in self._queues for queue in queues if queue)
            return max(0.0, min(oldest, default=now) + self.limits.max_delay_s - now) if self._waiting else 0.0

    def take(self, now: float) -> Formed[Pending]:
        """Form the next batch: the most urgent live tickets, of these the oldest, at most `rows_per_batch` rows.

        The foremost ticket always goes, and only those of its length bucket and company with it: others are passed
        over, but none of the same for a later one that would still fit. A single larger ticket goes alone. If `more`
        are waiting the caller has to see to it that they are taken; if not, the next offer will be told to.
        """
        formed: Formed[Pending] = Formed([], [], [])
        with self._lock:
            while not formed.batch and self._waiting:
                bucket = self._foremost()
                most = self.limits.rows_per_batch(bucket)
                self._fill(formed, bucket, most, now)
            formed.more = self._claimed = self._waiting > 0
        return formed

    def empty(self) -> list[Ticket[Pending]]:
        """Remove all that waits."""
        with self._lock:
            waiting = [ticket for queues in self._queues for queue in queues for ticket in queue]
            for ticket in waiting:
                self._forget(ticket)
            for queues in self._queues:
                for queue in queues:
                    queue.clear()
            return waiting

    def expire(self, now: float) -> tuple[list[Ticket[Pending]], float]:
        """Remove what waited past its deadline; also the earliest deadline among the rest (inf if none)."""
        with self._lock:
            waiting = [ticket for queues in self._queues for queue in queues for ticket in queue]
            expired = [ticket for ticket in waiting if ticket.deadline <= now]
            if expired:
                self._queues = [
                    [deque(ticket for ticket in queue if ticket.deadline > now) for queue in queues]
                    for queues in self._queues
                ]
            for ticket in expired:
                self._forget(ticket)
            return expired, min((ticket.deadline for ticket in waiting if ticket.deadline > now), default=math.inf)

    def _foremost(self) -> int:
        """The length bucket of the oldest ticket of the most urgent level, if anything waits at all."""
        if len(self.limits.lengths) < 2:
            return 0
        queues = next(queues for queues in self._queues if any(queues))
        return min((queue[0].enqueued_at, bucket) for bucket, queue in enumerate(queues) if queue)[1]

    def _fill(self, formed: Formed[Pending], bucket: int, most: int, now: float) -> None:
        """Move tickets of a length bucket into the batch until it is full, or until its foremost turned out dead."""
        rows = 0
        for queues in self._queues:
            queue = queues[bucket]
            passed: list[Ticket[Pending]] = []
            while queue:
                ticket = queue[0]
                if ticket.is_disconnected():
                    formed.left.append(ticket)
                elif ticket.deadline <= now:
                    formed.expired.append(ticket)
                elif formed.batch and ticket.company != formed.batch[0].company:
                    passed.append(queue.popleft())
                    continue
                elif formed.batch and rows + ticket.rows > most:
                    queue.extendleft(reversed(passed))
                    return
                else:
                    formed.batch.append(ticket)
                    rows += ticket.rows
                queue.popleft()
                self._forget(ticket)
                if not formed.batch:
                    return  # the foremost may be in another bucket now
            queue.extendleft(reversed(passed))

    def _forget(self, ticket: Ticket[Pending]) -> None:
        self._rows[ticket.level - 1][ticket.bucket] -= ticket.rows
        self.waiting_rows -= ticket.rows
        self._waiting -= 1
