"""One request on the short way of a connection, and its response: a body that arrives, and a task that answers.

It stands where uvicorn keeps its own cycle of a request, and has the attributes that uvicorn asks for there.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from leanserve.http.limits import HttpLimits
from leanserve.http.messages import Request, Response
from leanserve.request_identity import RequestIdentity

logger = logging.getLogger(__name__)

Answer = Callable[[Request], Awaitable[Response | None]]
"""Answers one request; `None` where nobody is left to get the response."""


class ExchangeOwner(Protocol):
    """The connection that a request came on."""

    loop: asyncio.AbstractEventLoop
    limits: HttpLimits
    parser: Any
    tasks: Any
    transport: Any

    def respond(self, exchange: Exchange, response: Response | None, identity: RequestIdentity) -> None:
        """Send the response, if there is one."""


class Exchange:
    """A request on the short way and its response, where uvicorn keeps its own `cycle`: with the attributes of that."""

    __slots__ = (
        "_answer",
        "_body",
        "_connection",
        "_headers",
        "_parts",
        "_path",
        "_query",
        "_task",
        "_waiter",
        "disconnected",
        "keep_alive",
        "length",
        "message_event",
        "missing",
        "response_complete",
    )

    def __init__(self, connection: ExchangeOwner, answer: Answer, url: bytes, headers: dict[bytes, bytes]) -> None:
        self._connection = connection
        self._answer = answer
        self._path, _, self._query = url.partition(b"?")
        self._headers = headers
        self._parts: list[bytes] = []
        self._body: bytes | memoryview | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.length = self.missing = int(headers[b"content-length"])
        self.disconnected = False
        parser = connection.parser
        # HTTP/1.0 keeps no connection alive unless it is asked to, and what asks is not heard: uvicorn has it so.
        asked = b"connection" in headers and parser.get_http_version() == "1.0"
        self.keep_alive = parser.should_keep_alive() and not asked
        self.response_complete = False
        self.message_event = _NOTHING_TO_WAKE

    @property
    def started(self) -> bool:
        """Whether the request is being answered, or was."""
        return self._task is not None

    @property
    def begun(self) -> bytes:
        """The part of the body that is here."""
        return b"".join(self._parts)

    def extend(self, part: bytes) -> None:
        """The next part of the body; of one that nobody wants any more only the length counts."""
        self.missing -= len(part)
        if not self.response_complete:
            self._parts.append(part)

    def complete(self) -> None:
        """The request is here as a whole."""
        body = self.begun
        self._parts = []
        if self._task is not None:
            self.arrived(body)
        elif b"content-encoding" in self._headers or self.length > self._connection.limits.body_bytes:
            self._body = body
            self.start()
        else:
            self.start(body)

    def start(self, body: bytes | None = None) -> None:
        """Answer the request, whose body came with its head or is to be received."""
        # The exchange does not keep the request: they would hold each other until the garbage collector looks.
        begun = self.begun if body is None else body
        request = Request(self._path.decode("ascii"), self._headers, self.receive, body, begun, query=self._query)
        connection = self._connection
        self._task = _task(connection.loop, self._run(request))
        if not self._task.done():  # it may have ended already
            connection.tasks.add(self._task)

    def arrived(self, body: bytes | memoryview) -> None:
        """Here is the whole body."""
        self.missing = 0
        if not self.response_complete:
            self._body = body
            self._wake()

    def skipped(self, _: memoryview) -> None:
        """The body, which nobody wanted, was read past."""
        self.missing = 0

    def lost(self) -> None:
        """The client has left."""
        self.disconnected = not self.response_complete
        self._parts = []
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def receive(self) -> dict[str, Any]:
        """ASGI's, for a body that did not come with the head: all of it in one message, once.

        It is not kept: an exchange lasts until the next one on its connection, which may idle for long.
        """
        if self._body is None and not self.disconnected:
            if self._headers.get(b"expect", b"").lower() == b"100-continue" and not self._parts:
                self._connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._waiter = self._connection.loop.create_future()
            await self._waiter
        body, self._body = self._body, None
        if body is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": body, "more_body": False}

    async def _run(self, request: Request) -> None:
        response = None
        try:
            response = await self._answer(request)
        except asyncio.CancelledError:  # the server ends, and waits no longer
            raise
        except BaseException:
            logger.exception("a request was left without a response")
        finally:
            self._connection.tasks.discard(self._task)
            self._connection.respond(self, response, request.identity)
            del self._connection  # which holds this exchange until the next one, or its end


def _task(loop: asyncio.AbstractEventLoop, run: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task that goes as far as it can at once, where Python has that."""
    if sys.version_info >= (3, 12):
        return asyncio.Task(run, loop=asyncio.get_running_loop(), eager_start=True)
    return loop.create_task(run)


class _NothingToWake:
    """Stands for the event that uvicorn sets when a client leaves."""

    def set(self) -> None: ...


_NOTHING_TO_WAKE = _NothingToWake()
