"""The bounded queue of one variant and the forming of its batches.

Late binding: a batch is formed by a lane of the device in the moment it is free to run it, so an idle lane adds no wait
and a busy device lets the batch grow. Rows are counted, not requests. What expired or lost its client is left out when
the batch is formed. No torch, no HTTP; the clock is an argument, so that a table of arrivals -> batches tests it.

The most urgent priority level goes first, within a level the oldest request. Nothing but its deadline keeps a less
urgent one from being overtaken again and again: no request waits longer than that.

Offers come from the event loop, `take` from the lanes; one lock, held for microseconds, keeps them apart. Somebody is
always on the way to `take` while anything waits, and never more than one (the *claim*).
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from service.contracts import Arrays
from service.errors import QueueFull


def _never_gone() -> bool:
    return False


Reply = TypeVar("Reply")


class Ticket(Generic[Reply]):
    """One request (or one part of a split request) waiting in a queue. Times are seconds of the caller's clock.

    `level` is its priority from 1, the most urgent, to the `levels` of the queue.
    """

    __slots__ = ("deadline", "enqueued_at", "gone", "level", "reply", "rows", "sample")

    def __init__(
        self,
        sample: Arrays,
        rows: int,
        reply: Reply,
        *,
        deadline: float = math.inf,
        gone: Callable[[], bool] = _never_gone,
        level: int = 1,
    ) -> None:
        self.sample = sample
        self.rows = rows
        self.reply = reply
        self.deadline = deadline
        self.gone = gone
        self.level = level
        self.enqueued_at = 0.0


class Formed(NamedTuple, Generic[Reply]):
    """What `take` found: tickets to run together, and those that are not run because they expired or are unwanted."""

    batch: list[Ticket[Reply]]
    expired: list[Ticket[Reply]]
    left: list[Ticket[Reply]]
    more: bool
    """Others are waiting: whoever took this batch sees to it that the next one is taken, too."""


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Rows per batch, rows that may wait, the wait for company on an idle device, and the longest wait at all.

    Priorities are 1, the most urgent, to `levels`; requests that name none have `default_level`.
    """

    max_rows: int
    queue_rows: int
    max_delay_s: float = 0.0
    timeout_s: float = 10.0
    levels: int = 1
    default_level: int = 1

    def level(self, priority: int) -> int:
        """The level of a request's priority; 0 and what is beyond the last level mean the default, as in Triton."""
        return priority if 1 <= priority <= self.levels else self.default_level


class Batcher(Generic[Reply]):
    """A bounded queue, first in first out within each priority level, that closes a batch as late as possible."""

    def __init__(self, limits: QueueLimits) -> None:
        self.limits = limits
        self.waiting_rows = 0
        self._queues: list[deque[Ticket[Reply]]] = [deque() for _ in range(limits.levels)]
        self._rows = [0] * limits.levels
        self._lock = threading.Lock()
        self._claimed = False

    def offer(self, tickets: list[Ticket[Reply]], now: float) -> bool:
        """Queue all tickets or none. True if nobody is on the way to `take` yet, so that the caller has to see to it.

        Raises:
            QueueFull: the rows do not fit into the queue.
        """
        rows = sum(ticket.rows for ticket in tickets)
        with self._lock:
            if self.waiting_rows + rows > self.limits.queue_rows:
                full = f"the queue holds {self.waiting_rows} of at most {self.limits.queue_rows} rows"
                raise QueueFull(f"{full}; {rows} more do not fit")
            for ticket in tickets:
                ticket.enqueued_at = now
                self._queues[ticket.level - 1].append(ticket)
                self._rows[ticket.level - 1] += ticket.rows
            self.waiting_rows += rows
            unclaimed, self._claimed = not self._claimed, True
            return unclaimed

    def waiting_requests(self) -> int:
        """Tickets in the queue now."""
        return sum(map(len, self._queues))

    def rows_before(self, level: int) -> int:
        """Waiting rows that go before a new request of this level: those of its own and of the more urgent ones."""
        return sum(self._rows[:level])

    def due(self, now: float) -> float:
        """Seconds until the next batch should be formed: 0 when it is full or has waited `max_delay_s`."""
        if self.limits.max_delay_s == 0:
            return 0.0
        with self._lock:
            if not any(self._queues) or self.waiting_rows >= self.limits.max_rows:
                return 0.0
            oldest = min(queue[0].enqueued_at for queue in self._queues if queue)
            return max(0.0, oldest + self.limits.max_delay_s - now)

    def take(self, now: float) -> Formed[Reply]:
        """Form the next batch: the most urgent live tickets, of these the oldest, at most `max_rows` rows.

        A single larger ticket goes alone. No ticket is passed over for a later one that would still fit. If `more` are
        waiting the caller has to see to it that they are taken; if not, the next offer will be told to.
        """
        batch: list[Ticket[Reply]] = []
        expired: list[Ticket[Reply]] = []
        left: list[Ticket[Reply]] = []
        rows = 0
        with self._lock:
            while (queue := self._foremost()) is not None:
                ticket = queue[0]
                if ticket.gone():
                    left.append(ticket)
                elif ticket.deadline <= now:
                    expired.append(ticket)
                elif batch and rows + ticket.rows > self.limits.max_rows:
                    break
                else:
                    batch.append(ticket)
                    rows += ticket.rows
                queue.popleft()
                self._forget(ticket)
            self._claimed = queue is not None
        return Formed(batch, expired, left, more=queue is not None)

    def expire(self, now: float) -> tuple[list[Ticket[Reply]], float]:
        """Remove what waited past its deadline; also the earliest deadline among the rest (inf if none)."""
        with self._lock:
            expired = [ticket for queue in self._queues for ticket in queue if ticket.deadline <= now]
            if expired:
                self._queues = [deque(ticket for ticket in queue if ticket.deadline > now) for queue in self._queues]
            for ticket in expired:
                self._forget(ticket)
            return expired, min((ticket.deadline for queue in self._queues for ticket in queue), default=math.inf)

    def _foremost(self) -> deque[Ticket[Reply]] | None:
        return next((queue for queue in self._queues if queue), None)

    def _forget(self, ticket: Ticket[Reply]) -> None:
        self._rows[ticket.level - 1] -= ticket.rows
        self.waiting_rows -= ticket.rows
