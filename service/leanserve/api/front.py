"""The outermost ASGI app of the server: it listens from the first second, and what answers behind it is replaced once.

Until the service is ready `starting.py` answers, then the hot path. Connections that are open stay open: they belong to
the front, and their next request finds the other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from leanserve.api.routes import App, HotPath
from leanserve.http.connection import Find
from leanserve.http.exchange import Answer
from leanserve.http.messages import AsgiScope, Receive, Send


class Front:
    """An ASGI app that also finds what connections answer on their short way; nothing before `serve`."""

    def __init__(self, starting: App) -> None:
        self._app: Callable[[AsgiScope, Receive, Send], Awaitable[None]] = starting
        self._find: Find = _nothing

    def serve(self, hot: HotPath) -> None:
        """From now on this app answers."""
        self._app, self._find = hot, hot.find

    def find(self, method: bytes, path: bytes) -> Answer | None:
        """What answers predictions on this path by this method."""
        return self._find(method, path)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _nothing(_method: bytes, _path: bytes) -> None:
    """No path answers predictions yet."""
