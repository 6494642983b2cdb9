"""What stands between FastAPI and its callers: the check of who may ask, and what browsers are told of pages.

Everything that FastAPI answers only reads (`tests/api/test_auth.py` holds that), so one role does for all but health.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html

from leanserve.api.access import Access
from leanserve.errors import ServiceError
from leanserve.http.messages import AsgiScope, Headers, Receive, Send, error_response, send_response

OPEN = ("/healthz", "/readyz")
"""What probes ask, which have no key."""
_ASSETS = "https://cdn.jsdelivr.net"
"""Where FastAPI's page of the API has its scripts."""


class GuardedApp:
    """An ASGI app in front of FastAPI's."""

    def __init__(self, app: FastAPI, access: Access) -> None:
        self._app = app
        self._access = access
        self._told = page_headers(_inline_scripts(app))

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        try:
            role = "open" if scope["path"] in OPEN else "read"
            self._access.admit_over_http(role, dict(scope["headers"]))  # type: ignore[arg-type]
        except ServiceError as error:
            return await send_response(send, error_response(error))

        async def send_told(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start" and _is_page(message.get("headers", ())):
                message = message | {"headers": [*message["headers"], *self._told]}
            await send(message)

        return await self._app(scope, receive, send_told)  # type: ignore[arg-type]


def page_headers(scripts: str = "'none'") -> Headers:
    """Of a page: it runs only these scripts (sources of a Content-Security-Policy), is in no frame, tells nobody."""
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline' {_ASSETS}; "
        "img-src 'self' data: https://fastapi.tiangolo.com; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return (
        (b"content-security-policy", policy.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"x-frame-options", b"DENY"),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-store"),
    )


def _is_page(headers: Headers) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/html") for name, value in headers)


def _inline_scripts(app: FastAPI) -> str:
    """The scripts of FastAPI's page of the API, the one within it by its hash."""
    page = get_swagger_ui_html(openapi_url=app.openapi_url or "", title=f"{app.title} - Swagger UI")
    found = re.findall(rb"<script>(.*?)</script>", bytes(page.body), re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script).digest()).decode() for script in found]
    return " ".join((_ASSETS, *(f"'sha256-{digest}'" for digest in digests)))
