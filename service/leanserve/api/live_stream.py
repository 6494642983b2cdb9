"""`GET /v1/live/stream`: the numbers of `GET /v1/live` once a second, as server-sent events, for the page at `/`.

One snapshot is made and written as JSON for all who listen, and none while nobody does. Who reads slowly misses some,
and holds up nobody. A stream ends when the service begins to drain, or serves another config; a browser comes again.
Source: the HTML standard, "Server-sent events".
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import orjson

from leanserve.contracts import Json
from leanserve.errors import RateLimited

MOST_LISTENERS = 32
PERIOD_S = 1.0
EVENT_STREAM = "text/event-stream"


class LiveStream:
    """The stream and those who listen to it; on the event loop only."""

    def __init__(self, snapshot: Callable[[], Json], is_over: Callable[[], bool], period_s: float = PERIOD_S) -> None:
        """`is_over` is asked before every event; once it says so all streams end, and new ones at once."""
        self._snapshot = snapshot
        self._is_over = is_over
        self._period_s = period_s
        self._telling: asyncio.Task[None] | None = None
        self._next: asyncio.Future[bytes | None]
        self.listeners = 0

    def listen(self) -> AsyncIterator[bytes]:
        """Events for one client more, until the stream is over or the iterator is closed.

        Raises:
            RateLimited: too many listen already.
        """
        if self.listeners >= MOST_LISTENERS:
            text = f"{MOST_LISTENERS} clients listen already; ask GET /v1/live now and then"
            raise RateLimited(text, retry_after_s=10.0)
        return self._events()

    async def _events(self) -> AsyncIterator[bytes]:
        self.listeners += 1
        try:
            if self._telling is None:
                self._next = asyncio.get_running_loop().create_future()
                self._telling = asyncio.create_task(self._tell())
            while (event := await asyncio.shield(self._next)) is not None:
                yield event
        finally:
            self.listeners -= 1

    async def _tell(self) -> None:
        """Make snapshots until nobody listens any more."""
        loop = asyncio.get_running_loop()
        try:
            while self.listeners and not self._is_over():
                event = b"data: %b\n\n" % orjson.dumps(self._snapshot(), option=orjson.OPT_NON_STR_KEYS)
                told, self._next = self._next, loop.create_future()
                told.set_result(event)
                await asyncio.sleep(self._period_s)
        finally:
            self._telling = None
            self._next.set_result(None)
