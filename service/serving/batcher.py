"""The bounded queue of one variant and the forming of its batches.

Late binding: a batch is formed by the device thread in the moment it is free to run it, so an idle device adds no wait
and a busy one lets the batch grow. Rows are counted, not requests. What expired or lost its client is left out when the
batch is formed. No torch, no HTTP; the clock is an argument, so that a table of arrivals -> batches tests it.

Offers come from the event loop, `take` from the device thread; one lock, held for microseconds, keeps them apart.
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
    """One request (or one part of a split request) waiting in a queue. Times are seconds of the caller's clock."""

    __slots__ = ("deadline", "enqueued_at", "gone", "reply", "rows", "sample")

    def __init__(
        self,
        sample: Arrays,
        rows: int,
        reply: Reply,
        *,
        deadline: float = math.inf,
        gone: Callable[[], bool] = _never_gone,
    ) -> None:
        self.sample = sample
        self.rows = rows
        self.reply = reply
        self.deadline = deadline
        self.gone = gone
        self.enqueued_at = 0.0


class Formed(NamedTuple, Generic[Reply]):
    """What `take` found: tickets to run together, and those that are not run because they expired or are unwanted."""

    batch: list[Ticket[Reply]]
    expired: list[Ticket[Reply]]
    left: list[Ticket[Reply]]


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Rows per batch, rows that may wait, the wait for company on an idle device, and the longest wait at all."""

    max_rows: int
    queue_rows: int
    max_delay_s: float = 0.0
    timeout_s: float = 10.0


class Batcher(Generic[Reply]):
    """A bounded first-in-first-out queue that closes a batch as late as possible."""

    def __init__(self, limits: QueueLimits) -> None:
        self.limits = limits
        self.waiting_rows = 0
        self._queue: deque[Ticket[Reply]] = deque()
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
            self._queue.extend(tickets)
            self.waiting_rows += rows
            unclaimed, self._claimed = not self._claimed, True
            return unclaimed

    def due(self, now: float) -> float:
        """Seconds until the next batch should be formed: 0 when it is full or has waited `max_delay_s`."""
        with self._lock:
            if not self._queue or self.waiting_rows >= self.limits.max_rows:
                return 0.0
            return max(0.0, self._queue[0].enqueued_at + self.limits.max_delay_s - now)

    def take(self, now: float) -> Formed[Reply]:
        """Form the next batch: the oldest live tickets, at most `max_rows` rows (a single larger ticket goes alone)."""
        formed: Formed[Reply] = Formed([], [], [])
        rows = 0
        with self._lock:
            while self._queue:
                ticket = self._queue[0]
                if ticket.gone():
                    formed.left.append(ticket)
                elif ticket.deadline <= now:
                    formed.expired.append(ticket)
                elif formed.batch and rows + ticket.rows > self.limits.max_rows:
                    break
                else:
                    formed.batch.append(ticket)
                    rows += ticket.rows
                self._queue.popleft()
                self.waiting_rows -= ticket.rows
        return formed

    def release(self) -> bool:
        """Called after a batch was run: True if more is waiting (the claim is kept), False if the queue is idle."""
        with self._lock:
            self._claimed = bool(self._queue)
            return self._claimed

    def expire(self, now: float) -> tuple[list[Ticket[Reply]], float]:
        """Remove what waited past its deadline; also the earliest deadline among the rest (inf if none)."""
        with self._lock:
            expired = [ticket for ticket in self._queue if ticket.deadline <= now]
            if expired:
                self._queue = deque(ticket for ticket in self._queue if ticket.deadline > now)
                self.waiting_rows -= sum(ticket.rows for ticket in expired)
            return expired, min((ticket.deadline for ticket in self._queue), default=math.inf)
