"""Calls over gRPC that last as long as their clients want them to: each takes 24 kB, and nothing else bounds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from leanserve.api.v2.grpc_answers import Context
from leanserve.errors import RateLimited
from leanserve.http.limits import HttpLimits

_EACH = 8
"""Of one connection; a client follows the health of one server once, and reads its reflection in one call."""


class OpenStreams:
    """Those of one server. On its loop only."""

    def __init__(self, limits: HttpLimits) -> None:
        self._most = limits.connections
        self._open = 0
        self._of: Counter[str] = Counter()
        """By connection."""

    def keep(self, limits: HttpLimits) -> None:
        """Keep these limits from now on."""
        self._most = limits.connections

    @contextmanager
    def one_more(self, context: Context) -> Iterator[None]:
        """For the time of the block.

        Raises:
            RateLimited: that would be too many.
        """
        connection = context.peer()
        if self._of[connection] >= _EACH:
            raise RateLimited(f"this connection has {_EACH} calls open that follow something; end one first")
        if self._open >= self._most:
            raise RateLimited(f"{self._most} calls that follow something are open (limits.connections)")
        self._open += 1
        self._of[connection] += 1
        try:
            yield
        finally:
            self._open -= 1
            self._of[connection] -= 1
            if not self._of[connection]:
                del self._of[connection]
