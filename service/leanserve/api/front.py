"""The outermost ASGI app of the server: it listens from the first second, and what answers behind it is replaced once.

Until the service is ready `starting.py` answers, then the hot path. Connections that are open stay open: they belong to
the front, and their next request finds the other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from leanserve.api.routes import App, HotPath
from leanserve.http.messages import Caller, Receive, Reply, Route, Scope, Send


class Predictions(Protocol):
    """What connections need of an app, to answer predictions on their short way (`connection.py`)."""

    @property
    def body_limit(self) -> int:
        """Bytes that a request's body may have."""

    @property
    def prediction(self) -> Callable[[str, str], Route | None]:
        """From method and path to the route that answers predictions there, if there is one."""

    @property
    def answer(self) -> Callable[[Route, Caller], Coroutine[Any, Any, Reply | None]]:
        """The reply to a request on its route; `None` where nobody is left to get it."""


class Front:
    """An ASGI app, and `Predictions`; none before `serve`."""

    def __init__(self, starting: App) -> None:
        self.body_limit = 0
        self.prediction: Callable[[str, str], Route | None] = _none
        self.answer: Callable[[Route, Caller], Coroutine[Any, Any, Reply | None]]
        self._app: Callable[[Scope, Receive, Send], Awaitable[None]] = starting

    def serve(self, hot: HotPath) -> None:
        """From now on this app answers."""
        self.body_limit, self.prediction, self.answer = hot.body_limit, hot.prediction, hot.answer
        self._app = hot

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _none(_method: str, _path: str) -> None:
    """No path answers predictions yet."""
