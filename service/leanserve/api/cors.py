"""CORS: which pages of other origins may use the service from a browser (the Fetch standard, section 3.2).

Only there if the config names origins: then this class takes the place of `HotPath`, which knows nothing of it. To an
origin that is not named all is as without CORS, and its browser keeps the reply from the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from leanserve.api.routes import App, HotPath
from leanserve.api.service import Service
from leanserve.config.schema import CorsConfig
from leanserve.http.messages import AsgiScope, Headers, Receive, Request, Response, Route, Send, send_response

METHODS = b"GET, HEAD, POST"
SENT = b"content-encoding, content-type, inference-header-content-length, x-variant"
"""Headers of requests that the service itself reads, besides the sticky one."""
EXPOSED = (
    b"inference-header-content-length, retry-after, x-batch-rows, x-caveats, x-inference-ms, x-queue-ms, x-variant"
)
"""Headers of replies that a page may read, besides those that any page may."""


class CrossOriginHotPath(HotPath):
    """The outermost ASGI app where pages of other origins are among the clients."""

    def __init__(self, service: Service, app: App) -> None:
        super().__init__(service, partial(self._ask_app, app))
        self._grants = Grants(service.config.cors, service.fleet.sticky_header)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "OPTIONS":
            preflight = self._grants.preflight(dict(scope["headers"]))
            if preflight is not None:
                return await send_response(send, preflight)
        return await super().__call__(scope, receive, send)

    async def answer(self, route: Route, caller: Request) -> Response | None:
        """The reply to a request, with what its browser wants to know."""
        reply = await super().answer(route, caller)
        if reply is None:
            return None
        return reply._replace(headers=(*reply.headers, *self._grants.headers(caller.headers)))

    async def _ask_app(self, app: App, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """The same for what `app` answers."""
        if scope["type"] != "http":
            return await app(scope, receive, send)
        headers = self._grants.headers(dict(scope["headers"]))

        async def send_granted(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message.get("headers", ()), *headers]}
            await send(message)

        return await app(scope, receive, send_granted)


class Grants:
    """What browsers are told."""

    def __init__(self, config: CorsConfig, sticky_header: bytes) -> None:
        self._any = "*" in config.origins
        self._origins = frozenset(origin.encode() for origin in config.origins)
        own = SENT + b", " + sticky_header
        self._sent = None if "*" in config.headers else b", ".join((own, *(name.encode() for name in config.headers)))
        self._max_age = b"%d" % config.max_age_s
        self._always = [(b"access-control-expose-headers", EXPOSED)]
        if config.credentials:
            self._always.append((b"access-control-allow-credentials", b"true"))

    def headers(self, request: Mapping[bytes, bytes]) -> Headers:
        """The headers of any reply, from those of its request.

        Caches must know that a reply depends on the origin, also where there is none.
        """
        if self._any:
            return [(b"access-control-allow-origin", b"*"), *self._always]
        origin = request.get(b"origin")
        if origin not in self._origins:
            return [(b"vary", b"origin")]
        return [(b"vary", b"origin"), (b"access-control-allow-origin", origin), *self._always]

    def preflight(self, request: Mapping[bytes, bytes]) -> Response | None:
        """The reply to a browser that asks whether its page may send a request; `None` where that is not asked."""
        origin = request.get(b"origin")
        if b"access-control-request-method" not in request or not (self._any or origin in self._origins):
            return None
        wanted = request.get(b"access-control-request-headers", b"")
        told = [
            (b"access-control-allow-methods", METHODS),
            (b"access-control-allow-headers", wanted if self._sent is None else self._sent),
            (b"access-control-max-age", self._max_age),
        ]
        return Response(b"", [*self.headers(request), *told])
