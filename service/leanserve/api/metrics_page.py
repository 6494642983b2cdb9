"""`GET /metrics`: the page for Prometheus, made on a thread of its own.

To make it takes milliseconds, as many as there are variants; the event loop only has what it counts later counted
before. Those that ask while a page is made get the same one, so that no number of scrapers takes more than one thread.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from fastapi import Request, Response

from leanserve.http.content_encoding import compress, permits_gzip
from leanserve.telemetry.metrics import Metrics

_Form = tuple[str, bool]
"""What a page is made for: the `Accept` header, and whether it may be compressed."""
_LONGEST = 1000
"""Characters of an `Accept` header that are read."""


class MetricsPage:
    """The page of a fleet's metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._pending: dict[_Form, asyncio.Future[Response]] = {}

    async def answer(self, request: Request) -> Response:
        """The page in the form that is asked for, compressed where the client permits it."""
        headers = request.headers
        form = headers.get("accept", "")[:_LONGEST], permits_gzip(headers.get("accept-encoding", ""))
        pending = self._pending.get(form)
        if pending is None:
            self._metrics.catch_up()
            loop = asyncio.get_running_loop()
            pending = self._pending[form] = loop.run_in_executor(self._thread, self._made, *form)
            pending.add_done_callback(lambda _: self._pending.pop(form))
        return await asyncio.shield(pending)

    def _made(self, accept: str, gzip: bool) -> Response:  # noqa: FBT001 - run_in_executor takes no names
        content, content_type = self._metrics.page(accept)
        headers = {"content-type": content_type, "vary": "accept, accept-encoding"}
        if not gzip:
            return Response(content, headers=headers)
        return Response(compress(content, "gzip"), headers=headers | {"content-encoding": "gzip"})
