"""The outermost ASGI app of the server: it listens from the first second, and what answers behind it is replaced.

Until the service is ready `starting.py` answers, then the hot path, and another one after a reload. Connections that
are open stay open: they belong to the front, and their next request finds the other. Every request gets its identity
here, whoever answers it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from leanserve.api.health import LIVE, READY
from leanserve.api.routes import App, HotPath
from leanserve.http.exchange import Answer
from leanserve.http.loop_turns import LoopTurns
from leanserve.http.messages import AsgiScope, Receive, Request, Response, Send
from leanserve.request_identity import CURRENT_REQUEST, RequestIdentities

_AT_ONCE = 4
"""Requests other than predictions that are begun in one turn of the loop; each takes it about a millisecond."""
_PROBES = (LIVE, READY)
"""Answered at once, however many ask for something else."""


class Front:
    """An ASGI app that also finds what connections answer on their short way; nothing before `serve`."""

    def __init__(self, starting: App) -> None:
        self._app: Callable[[AsgiScope, Receive, Send], Awaitable[None]] = starting
        self._answers: Mapping[bytes, Answer] = {}
        self._identities = RequestIdentities()
        self._turns = LoopTurns(_AT_ONCE)

    def serve(self, hot: HotPath) -> None:
        """From now on this app answers."""
        self._app = hot
        self._answers = {path: partial(self._identified, answer) for path, answer in hot.predictions.items()}

    def find(self, method: bytes, path: bytes) -> Answer | None:
        """What answers predictions on this path by this method."""
        return self._answers.get(path) if method == b"POST" else None

    def _identified(self, answer: Answer, request: Request) -> Awaitable[Response | None]:
        """The answer to a request, to be awaited in the task that calls this."""
        request.identity = identity = self._identities.of(request.headers)
        CURRENT_REQUEST.set(identity)
        return answer(request)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if scope["path"] not in _PROBES:
            await self._turns.wait(1)
        identity = self._identities.of(dict(scope["headers"]))
        CURRENT_REQUEST.set(identity)

        async def send_identified(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message.get("headers", ()), *identity]}
            await send(message)

        return await self._app(scope, receive, send_identified)
