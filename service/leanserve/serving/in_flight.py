"""How many tickets of a variant have no outcome yet, so that it can be closed in the moment when there are none.

A ticket is counted from its place in the queue to its outcome, whatever that is and whoever still waits for it; the
queue alone does not tell, for a batch that a lane has taken is no longer in it. All on the event loop.
"""

from __future__ import annotations

import asyncio


class InFlightCount:
    """The number of tickets in the queue or on a lane."""

    def __init__(self) -> None:
        self._tickets = 0
        self._none_left: asyncio.Future[None] | None = None

    def add(self, tickets: int) -> None:
        """So many were queued."""
        self._tickets += tickets

    def settle(self, tickets: int) -> None:
        """So many were given their outcome."""
        self._tickets -= tickets
        if self._none_left is not None and not self._tickets:
            self._none_left.set_result(None)
            self._none_left = None

    async def none(self) -> None:
        """Wait until every ticket has its outcome; one waits at a time."""
        await asyncio.sleep(0)  # tasks that were made in this turn of the loop queue their tickets first
        if self._tickets:
            self._none_left = asyncio.get_running_loop().create_future()
            await self._none_left
