"""Raw ASGI in front of FastAPI: predictions take the short way, everything else goes on to the app.

FastAPI's routing, dependency injection and response models cost more than a small model's inference. Errors become the
same bodies as everywhere (`wire.error_body`).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from service.api.predict import Answer, Caller, predict
from service.api.wire import Receive, Scope, Send, error_body, error_headers, send_json
from service.errors import ClientGone, ServiceError
from service.serving.fleet import Fleet

App = Callable[[Scope, Receive, Send], Awaitable[None]]
PREDICT = "/v1/predict"


class HotPath:
    """The outermost ASGI app: serves and counts predictions, passes the rest to `app`."""

    def __init__(self, fleet: Fleet, app: App) -> None:
        self._fleet = fleet
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PREDICT:
            return await self._app(scope, receive, send)
        if scope["method"] != "POST":
            text = f"{PREDICT} takes POST, not {scope['method']}"
            return await send_json(send, 405, error_body(text, "method_not_allowed"), [(b"allow", b"POST")])
        return await self._serve(Caller(scope, receive), send)

    async def _serve(self, caller: Caller, send: Send) -> None:
        started = time.perf_counter()
        outcome = "internal"
        try:
            answer: Answer = await predict(self._fleet, caller)
            outcome = "ok"
            await send_json(send, 200, answer.body, [(b"x-variant", answer.variant.encode())])
        except ClientGone as error:
            outcome = error.code
        except ServiceError as error:
            outcome = error.code
            headers = [(name.encode(), value.encode()) for name, value in error_headers(error).items()]
            await send_json(send, error.status, error_body(str(error), error.code), headers)
        finally:
            counted = self._fleet.metrics.variants.get(caller.variant or "", self._fleet.metrics.unrouted)
            counted.request_done(outcome, time.perf_counter() - started)
