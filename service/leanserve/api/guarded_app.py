"""What stands between FastAPI and its callers: the check of who may ask.

Everything that FastAPI answers only reads (`tests/api/test_auth.py` holds that), so one role does for all of it.
"""

from __future__ import annotations

from fastapi import FastAPI

from leanserve.api.access import Access
from leanserve.errors import ServiceError
from leanserve.http.messages import AsgiScope, Receive, Send, error_response, send_response


class GuardedApp:
    """An ASGI app in front of FastAPI's."""

    def __init__(self, app: FastAPI, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._access.admit_over_http("read", dict(scope["headers"]))
            except ServiceError as error:
                return await send_response(send, error_response(error))
            # Nothing behind takes a query, and FastAPI would parse one: thousands of parameters, a millisecond.
            scope = {**scope, "query_string": b""}
        return await self._app(scope, receive, send)
