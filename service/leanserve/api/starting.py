"""What answers while the service starts: alive, not ready, and how far it is.

Imports nothing that takes long. Whatever needs a variant is a 503 with `Retry-After`, in the error shape of its path.
"""

from __future__ import annotations

from collections.abc import Callable

from leanserve.api.access import Access
from leanserve.api.cors import Grants
from leanserve.api.openai.embeddings import EMBEDDINGS
from leanserve.api.openai.models import MODELS, refusal
from leanserve.api.page_files import page_files
from leanserve.config.lineage import lineage
from leanserve.config.schema import ServiceConfig
from leanserve.contracts import Json
from leanserve.errors import NotReady, ServiceError
from leanserve.http.messages import (
    AsgiScope,
    Receive,
    Request,
    Response,
    Send,
    error_headers,
    error_response,
    json_response,
    send_response,
)
from leanserve.telemetry.metrics import StartMetrics
from leanserve.telemetry.startup import Startup

_READ = ("/v1/variants", "/metrics")
"""Not for probes, but for those who may read."""


class StartingApp:
    """A raw ASGI app over the progress of a start."""

    def __init__(self, startup: Startup, config: ServiceConfig, access: Access) -> None:
        self._startup = startup
        self._access = access
        self._passes = {
            variant.name: [step.kind for part in lineage(config.variants, variant) for step in part.passes]
            for variant in config.variants
        }
        self._metrics = StartMetrics(startup)
        self._files = page_files()
        self._routes: dict[str, Callable[[Request], Response]] = {
            "/healthz": lambda _: json_response({"live": True}),
            "/v2/health/live": lambda _: json_response({"live": True, "ready": False}),
            "/v1/variants": lambda _: json_response(self._variants()),
            "/metrics": self._page,
            "/readyz": lambda _: self._not_ready(),
            "/v2/health/ready": lambda _: self._not_ready(),
        }
        sticky = config.traffic.sticky_header.lower().encode()
        self._grants = Grants(config.cors, sticky) if config.cors.origins else None

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        caller, grants = Request(scope["path"], dict(scope["headers"]), receive), self._grants
        if caller.path in self._files and scope["method"] in {"GET", "HEAD"}:
            return await send_response(send, await self._files[caller.path].answer(caller))
        if grants is None:
            return await send_response(send, self._reply(scope["method"], caller))
        if scope["method"] == "OPTIONS" and (preflight := grants.preflight(caller.headers)):
            return await send_response(send, preflight)
        reply = self._reply(scope["method"], caller)
        return await send_response(send, reply._replace(headers=(*reply.headers, *grants.headers(caller.headers))))

    def _reply(self, method: str, caller: Request) -> Response:
        route = self._routes.get(caller.path) if method in {"GET", "HEAD"} else None
        if route is not None:
            try:
                self._access.admit("read" if caller.path in _READ else "open", caller.headers)
            except ServiceError as error:
                return error_response(error)
            return route(caller)
        for_openai = caller.path in {EMBEDDINGS, MODELS} or caller.path.startswith(f"{MODELS}/")
        return (refusal if for_openai else error_response)(refused(self._startup))

    def _not_ready(self) -> Response:
        """A refusal with the progress beside the error's text."""
        error = refused(self._startup)
        body = {"error": str(error), "code": error.code, "ready": False, "progress": self._startup.progress()}
        headers = [(name.encode(), value.encode()) for name, value in error_headers(error).items()]
        return json_response(body, headers, error.status)

    def _variants(self) -> Json:
        return {
            "model": self._startup.model,
            "starting": self._startup.progress(),
            "variants": [
                {"name": name, "state": state, "reason": reason or None, "passes": self._passes[name]}
                for name, (state, reason) in self._startup.variants.items()
            ],
        }

    def _page(self, caller: Request) -> Response:
        content, content_type = self._metrics.render(caller.header(b"accept") or "")
        return Response(content, [(b"content-type", content_type.encode())])


def refused(startup: Startup) -> NotReady:
    """Why nothing is answered yet, and when to ask again."""
    return NotReady(str(startup), retry_after_s=startup.retry_after_s)
