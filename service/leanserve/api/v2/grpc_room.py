"""The memory that messages over gRPC may take, all calls together (`limits.buffered_bytes`).

gRPC tells of a message once all of it is here, and keeps what has come of it as soon as somebody has asked for it. So
not everybody asks at once: each call that does takes the room of the largest message until it has its own, and keeps
what a large one takes until it is answered. Where there is no room, the call that has been asking for longest ends,
unless it has just begun: a client that stalls has no advantage of it. What comes for those that do not ask yet stays
with the client, but for the 64 KiB that a connection takes in anyway.

Large replies are counted until their clients have them (`limits.unread_bytes`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from leanserve.errors import BadInput, NotReady, QueueTimeout, ServiceError
from leanserve.http.limits import HttpLimits
from leanserve.http.rate_limited_log import RateLimitedLog

logger = logging.getLogger(__name__)

_SMALL = 2**16
"""Bytes of a message that are not counted once it is here."""
PATIENCE_S = 0.1
"""For so long a message may take to come, whoever waits for room meanwhile."""
_WAIT_S = 2.0
"""Who has no room after that is told to come again."""
_LOOK_S, _PRESSED_LOOK_S = 1.0, 0.02
"""How often it is looked for those who take too long, and how often while others wait."""


class MessageRoom:
    """The messages of one server. Belongs to the thread of its loop."""

    def __init__(self, limits: HttpLimits) -> None:
        self.held = 0
        """Bytes that are taken, or may be at any time."""
        self._limits = limits
        self._most = limits.buffered_bytes
        self._asking: dict[asyncio.Task[Any], float] = {}
        """Those whose message is not here as a whole, and since when; the first has waited for longest."""
        self.unread = 0
        """Bytes of large replies that are not yet with their clients."""
        self._ended: dict[asyncio.Task[Any], ServiceError] = {}
        self._waiting: list[asyncio.Future[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._log = RateLimitedLog(logger)

    @property
    def most_headers(self) -> int:
        """Fields of metadata that a call may have."""
        return self._limits.headers

    def keep(self, limits: HttpLimits) -> None:
        """Keep these limits from now on, but for the size of the largest message, which gRPC knows for good."""
        self._limits = limits._replace(body_bytes=self._limits.body_bytes)
        self._most = limits.buffered_bytes

    @asynccontextmanager
    async def message(self, context: Any) -> AsyncIterator[bytes]:
        """The message of a call, which has its room until the block ends.

        Raises:
            NotReady: there was no room, or others needed it. QueueTimeout: it took longer than a body may.
            BadInput: the call ended without one.
        """
        most = self._limits.body_bytes
        if self.held and self.held + most > self._most:
            await self._wait(most)
        self.held += most
        taken = most
        try:
            data = await self._asked(context)
            size = len(data)
            taken = size if size > _SMALL else 0
            self._give_back(most - taken)
            yield data
        finally:
            if taken:
                self._give_back(taken)

    def keep_reply(self, context: Any, nbytes: int) -> None:
        """Count the large reply of a call until its client has it.

        gRPC lets nobody take one back, so those that are too many are refused; the first may have any size.

        Raises:
            NotReady: clients have left too much unread.
        """
        if nbytes <= _SMALL:
            return
        if self.unread and self.unread + nbytes > self._limits.unread_bytes:
            most = self._limits.unread_bytes
            self._log.tell("unread", "refused a call over gRPC, as others do not read theirs (limits.unread_bytes)")
            text = f"clients have left more than {most} bytes of their replies unread (limits.unread_bytes)"
            raise NotReady(f"{text}; try again later", retry_after_s=1.0)
        self.unread += nbytes
        context.add_done_callback(lambda _: self._have_read(nbytes))

    def _have_read(self, nbytes: int) -> None:
        self.unread -= nbytes

    async def _asked(self, context: Any) -> bytes:
        task = asyncio.current_task()
        assert task is not None
        self._asking[task] = time.monotonic()
        if self._timer is None:
            self._look_after(_LOOK_S)
        try:
            data = await context.read()
        except asyncio.CancelledError:
            if (failure := self._ended.pop(task, None)) is None:
                raise
            task.uncancel()
            raise failure from None
        finally:
            del self._asking[task]
        if not isinstance(data, bytes):
            raise BadInput("the call ended before its message came")
        return data

    async def _wait(self, most: int) -> None:
        """Until there is room. Whoever came last goes first: a crowd that waits for its own stalled calls has to."""
        give_up = time.monotonic() + _WAIT_S
        self._look_after(_PRESSED_LOOK_S)
        while self.held and self.held + most > self._most:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                async with asyncio.timeout(give_up - time.monotonic()):
                    await turn
            except TimeoutError:
                self._log.tell("room", "refused a call over gRPC (limits.buffered_bytes)")
                raise self._full() from None
            finally:
                if turn in self._waiting:
                    self._waiting.remove(turn)

    def end_asking(self) -> None:
        """End the calls whose messages are not here as a whole; at the end of the server nobody waits for these."""
        for task in list(self._asking):
            self._end(task, NotReady("draining: the message did not arrive in time"))

    def _full(self) -> NotReady:
        text = f"all calls have more than {self._most} bytes (limits.buffered_bytes); try again later"
        return NotReady(text, retry_after_s=1.0)

    def _give_back(self, nbytes: int) -> None:
        self.held -= nbytes
        if self._waiting:
            turn = self._waiting.pop()
            if not turn.done():
                turn.set_result(None)

    def _look_after(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        """End those whose messages take too long."""
        self._timer = None
        now, pressed = time.monotonic(), bool(self._waiting)
        for task, since in list(self._asking.items()):
            if now - since > self._limits.body_s:
                text = f"the message did not arrive within {self._limits.body_s:g} s (limits.body_s)"
                self._end(task, QueueTimeout(text))
            elif pressed and now - since > PATIENCE_S:
                self._end(task, self._full())
                pressed = False
        if self._asking or self._waiting:
            self._look_after(_PRESSED_LOOK_S if self._waiting else min(_LOOK_S, self._limits.body_s))

    def _end(self, task: asyncio.Task[Any], failure: ServiceError) -> None:
        if task not in self._ended:
            self._log.tell("message", f"ended a call over gRPC: {failure}")
            self._ended[task] = failure
            task.cancel()
