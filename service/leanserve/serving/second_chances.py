"""Requests that were in a worker when it was lost: each is run once more, by itself, when there is a worker again.

Nobody knows which row of a batch has killed the worker, or whether any has. Run by themselves the innocent are
answered, and the one that kills a worker again is known: it is refused. A request that had another batch beside it in
the worker that time may still be innocent, and gets one more chance. No lane waits meanwhile; a request waits here
until its deadline. All on the event loop.
"""

from __future__ import annotations

import math
from asyncio import AbstractEventLoop
from collections.abc import Callable

from leanserve.errors import WorkerLost
from leanserve.serving.batch_runner import PendingResult
from leanserve.serving.batcher import Ticket
from leanserve.serving.expiry import ExpiryTimer

MOST_RUNS = 3
"""A request that was in a worker so often when it was lost is refused, whatever was beside it."""
_Ticket = Ticket[PendingResult]


class Suspect:
    """The company of a request that shares no batch any more: it has none but itself."""

    __slots__ = ("runs",)

    def __init__(self) -> None:
        self.runs = 1
        """How often it was in a worker that was lost."""


class SecondChances:
    """The requests of one variant that wait for a worker."""

    def __init__(self, loop: AbstractEventLoop, settled: Callable[[int], None]) -> None:
        """`settled` is told how many of those that waited here have their outcome."""
        self._waiting: list[_Ticket] = []
        self._settled = settled
        self._timer = ExpiryTimer(loop, self._expire)

    def keep(self, ticket: _Ticket, error: WorkerLost) -> bool:
        """Whether a request that has met this error waits here now; else it has had its chances."""
        if error.ran and not self._may_run_again(ticket, error):
            return False
        self._waiting.append(ticket)
        if math.isfinite(ticket.deadline):
            self._timer.by(ticket.deadline)
        return True

    def take(self) -> list[_Ticket]:
        """All that wait, to be queued again; none of them waits here any more."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def refuse(self, why: str) -> None:
        """No worker will be there soon."""
        self._refuse(self.take(), why)

    def _may_run_again(self, ticket: _Ticket, error: WorkerLost) -> bool:
        if not isinstance(ticket.company, Suspect):
            ticket.company = Suspect()
            return True
        ticket.company.runs += 1
        return not error.alone and ticket.company.runs < MOST_RUNS

    def _expire(self, now: float) -> float:
        late = [ticket for ticket in self._waiting if ticket.deadline <= now]
        self._waiting = [ticket for ticket in self._waiting if ticket.deadline > now]
        self._refuse(late, "it is not back before the deadline of the request")
        return min((ticket.deadline for ticket in self._waiting), default=math.inf)

    def _refuse(self, tickets: list[_Ticket], why: str) -> None:
        for ticket in tickets:
            if not ticket.reply.done():
                ticket.reply.set_exception(WorkerLost(f"the worker of the variant was lost; {why}"))
        self._settled(len(tickets))
