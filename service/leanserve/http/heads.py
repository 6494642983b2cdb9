"""What the heads of recent prediction requests say, so that a head which comes again need not be parsed again.

Shared by all connections: clients of one kind send the same head. `connection.py` says when it may be used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from leanserve.api.front import Predictions
from leanserve.http.messages import Route, Scope

_HEADS = 256
_HEAD_BYTES = 4096
_UNUSUAL = frozenset(
    b"content-encoding expect http2-settings keep-alive proxy-connection te trailer transfer-encoding upgrade".split()
)
"""Headers that say how the body, the connection or the reply is to be written; but for `Connection: keep-alive`."""


class Head(NamedTuple):
    """What the head of a request says: a prediction, `length` bytes of body, and the connection stays open."""

    route: Route
    path: str
    headers: Mapping[bytes, bytes]
    length: int


class KnownHeads:
    """The heads of recent prediction requests: at most 256 of at most 4 KiB; starts afresh when these are used up."""

    def __init__(self, hot: Predictions) -> None:
        self._hot = hot
        self._heads: dict[bytes, Head] = {}
        self.get = self._heads.get

    def learn(self, head: bytes, scope: Scope, length: int) -> None:
        """Remember what was parsed from this head of a request with `length` bytes of body, if it is a usual one.

        A usual head has a line for each header, each header once, and the length of the body as the only thing that
        concerns the connection.
        """
        route = self._hot.prediction(scope["method"], scope["path"])
        headers = dict(scope["headers"])
        if (
            route is None
            or len(head) > _HEAD_BYTES
            or not len(headers) == len(scope["headers"]) == head.count(b"\r\n") - 2 == head.count(b"\n") - 2
            or not _UNUSUAL.isdisjoint(headers)
            or headers.get(b"connection", b"keep-alive").lower() != b"keep-alive"
            or headers.get(b"content-length") != b"%d" % length
            or length > self._hot.body_limit
        ):
            return
        if len(self._heads) >= _HEADS:
            self._heads.clear()
        self._heads[head] = Head(route, scope["path"], headers, length)
