"""What is done on the event loop of all that came at once: a little in each of its turns, first come first served.

A loop does everything that has come before it turns to anything else. Three hundred requests of a millisecond each,
on as many connections, would keep everybody else waiting for all of them.
"""

from __future__ import annotations

import asyncio
from collections import deque


class LoopTurns:
    """Shares the turns of one loop: in each, what is begun costs `each` together, and what comes last may exceed it."""

    def __init__(self, each: int) -> None:
        self._each = self._left = each
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()
        self._renews = False

    async def wait(self, cost: int) -> None:
        """Until something of this cost may be done."""
        loop = asyncio.get_running_loop()
        if not self._renews:
            self._renews = True
            loop.call_soon(self._renew, loop)
        if self._left > 0 and not self._waiting:
            self._left -= cost
            return
        turn = loop.create_future()
        self._waiting.append((turn, cost))
        await turn

    def _renew(self, loop: asyncio.AbstractEventLoop) -> None:
        self._left = self._each
        while self._waiting and self._left > 0:
            turn, cost = self._waiting.popleft()
            if not turn.done():
                self._left -= cost
                turn.set_result(None)
        self._renews = bool(self._waiting)
        if self._renews:
            loop.call_soon(self._renew, loop)
