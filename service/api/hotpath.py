"""Raw ASGI in front of FastAPI: predictions and the Open Inference Protocol take the short way, the rest the app.

FastAPI's routing, dependency injection and response models cost more than a small model's inference. A path is one
look-up in a table; errors become the same bodies as everywhere (`wire.error_body`).
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial

from service.api.open_inference_http import no_such_path, open_inference_routes
from service.api.predict import predict
from service.api.wire import (
    Caller,
    Receive,
    Reply,
    Route,
    Scope,
    Send,
    error_body,
    error_headers,
    send_json,
    send_reply,
)
from service.errors import ClientGone, ServiceError
from service.serving.fleet import Fleet

logger = logging.getLogger(__name__)

App = Callable[[Scope, Receive, Send], Awaitable[None]]
PREDICT = "/v1/predict"


class HotPath:
    """The outermost ASGI app: serves and counts predictions, passes what it has no route for to `app`."""

    def __init__(self, fleet: Fleet, app: App) -> None:
        self._fleet = fleet
        self._app = app
        self._routes = {PREDICT: Route("POST", "prediction", partial(predict, fleet)), **open_inference_routes(fleet)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path, method = scope["path"], scope["method"]
        route = self._routes.get(path)
        if route is None:
            if not path.startswith("/v2/"):
                return await self._app(scope, receive, send)
            route = Route(method, "prediction" if path.endswith("/infer") else "description", self._unknown)
        if method != route.method and not (method == "HEAD" and route.method == "GET"):
            error = error_body(f"{path} takes {route.method}, not {method}", "method_not_allowed")
            allow = b"GET, HEAD" if route.method == "GET" else route.method.encode()
            return await send_json(send, 405, error, [(b"allow", allow)])
        return await self._serve(route, Caller(scope, receive), send)

    async def _unknown(self, caller: Caller) -> Reply:
        raise no_such_path(self._fleet, caller.scope["path"])

    async def _serve(self, route: Route, caller: Caller, send: Send) -> None:
        started = time.perf_counter()
        outcome = "internal"
        try:
            reply = await route.answer(caller)
            outcome = "ok"
            await send_reply(send, 200, reply)
        except ClientGone as error:
            outcome = error.code
        except ServiceError as error:
            outcome = error.code
            headers = [(name.encode(), value.encode()) for name, value in error_headers(error).items()]
            await send_json(send, error.status, error_body(str(error), error.code), headers)
        except Exception:
            if outcome == "ok":
                raise  # the reply is on its way already
            await _confess(send, caller.scope["path"])
        finally:
            if route.counts == "prediction":
                counted = self._fleet.metrics.variants.get(caller.variant or "", self._fleet.metrics.unrouted)
                counted.request_done(outcome, time.perf_counter() - started)


async def _confess(send: Send, path: str) -> None:
    """A bug of ours: the stack goes into the log, the client gets the id to ask for it."""
    incident = uuid.uuid4().hex[:12]
    logger.exception("failed on a request to %s, id %s", path, incident)
    text = f"the service failed on this request; its log has the details under id {incident}"
    await send_json(send, 500, error_body(text, ServiceError.code))
