"""CORS: which pages of other origins may use the service from a browser (the Fetch standard, section 3.2).

Only there if the config names origins: then `CrossOriginHotPath` takes the place of `HotPath`, which knows nothing of
it. To an origin that is not named all is as without CORS, and its browser keeps the reply from the page.
"""

from __future__ import annotations

from collections.abc import Mapping

from leanserve.config.schema import CorsConfig
from leanserve.http.messages import Headers, Response

METHODS = b"GET, HEAD, POST, PUT"
SENT = (
    b"authorization, content-encoding, content-type, inference-header-content-length, traceparent, tracestate, "
    b"x-api-key, x-request-id, x-variant"
)
"""Headers of requests that the service itself reads, besides the sticky one."""
EXPOSED = (
    b"inference-header-content-length, retry-after, traceparent, www-authenticate, x-batch-rows, x-caveats, "
    b"x-experiment, x-inference-ms, x-queue-ms, x-request-id, x-variant"
)
"""Headers of replies that a page may read, besides those that any page may."""


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
