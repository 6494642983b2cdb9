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

from leanserve.api.caveats import caveat_headers
from leanserve.api.openai.embeddings import embeddings_route
from leanserve.api.openai.models import MODELS, ModelList
from leanserve.api.v1.predict import predict
from leanserve.api.v2.rest import no_such_path, open_inference_routes
from leanserve.errors import ClientGone, MethodNotAllowed, OutOfMemory, ServiceError
from leanserve.http.exchange import Answer
from leanserve.http.messages import AsgiScope, Receive, Request, Response, Route, Send, send_response
from leanserve.memory import is_out_of_memory
from leanserve.serving.fleet import Fleet

logger = logging.getLogger(__name__)

App = Callable[[AsgiScope, Receive, Send], Awaitable[None]]
PREDICT, EMBEDDINGS = "/v1/predict", "/v1/embeddings"


class HotPath:
    """The outermost ASGI app: serves and counts predictions, passes what it has no route for to `app`."""

    def __init__(self, fleet: Fleet, app: App) -> None:
        self._fleet = fleet
        self._app = app
        self._caveats = caveat_headers(fleet.base.caveats)
        self._models = ModelList(fleet)
        self._routes = {
            PREDICT: Route("POST", "prediction", partial(predict, fleet)),
            EMBEDDINGS: embeddings_route(fleet),
            MODELS: self._models.all,
            **open_inference_routes(fleet),
        }
        self._predictions = {
            path.encode(): partial(self.answer, route)
            for path, route in self._routes.items()
            if route.counts == "prediction"
        }

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path, method = scope["path"], scope["method"]
        route = self._routes.get(path) or self._route_below(method, path)
        if route is None:
            return await self._app(scope, receive, send)
        if method != route.method and not (method == "HEAD" and route.method == "GET"):
            route = route._replace(answer=partial(_wrong_method, method, route.method))
        # ASGI gives the names in lower case. A dict costs less than a second look through the list.
        reply = await self.answer(route, Request(path, dict(scope["headers"]), receive))
        if reply is not None:
            await send_response(send, reply)
        return None

    def _route_below(self, method: str, path: str) -> Route | None:
        """The route of a path that is in no table, but below one that is answered here."""
        if path.startswith("/v2/"):
            return Route(method, "prediction" if path.endswith("/infer") else "description", self._unknown)
        return self._models.one if path.startswith(f"{MODELS}/") else None

    def find(self, method: bytes, path: bytes) -> Answer | None:
        """What answers predictions on this path by this method."""
        return self._predictions.get(path) if method == b"POST" else None

    async def answer(self, route: Route, caller: Request) -> Response | None:
        """The reply to a request, also where it is refused or fails; `None` where nobody is left to get it."""
        started = time.perf_counter()
        outcome = ServiceError.code
        try:
            reply = await route.answer(caller)
            outcome = "ok"
        except ClientGone as error:
            outcome = error.code
            return None
        except ServiceError as error:
            outcome = error.code
            return route.refuse(error)
        except Exception as error:
            failure = confession(error, f"a request to {caller.path}")
            outcome = failure.code
            return route.refuse(failure)
        finally:
            if route.counts == "prediction":
                counted = self._fleet.metrics.variants.get(caller.variant or "", self._fleet.metrics.unrouted)
                counted.request_done(outcome, time.perf_counter() - started)
        if self._caveats and route.counts == "prediction":
            return Response(reply.body, (*reply.headers, *self._caveats), reply.status)
        return reply

    async def _unknown(self, caller: Request) -> Response:
        raise no_such_path(self._fleet, caller.path)


async def _wrong_method(method: str, right: str, caller: Request) -> Response:
    allow = "GET, HEAD" if right == "GET" else right
    raise MethodNotAllowed(f"{caller.path} takes {right}, not {method}", allow)


def confession(error: Exception, what: str) -> ServiceError:
    """Memory that ran out, or a bug of ours: the stack goes into the log, the client gets the id to ask for it."""
    if is_out_of_memory(error):
        logger.error("memory ran out on %s: %s", what, error)
        return OutOfMemory("memory ran out on this request; try again later")
    incident = uuid.uuid4().hex[:12]
    logger.error("failed on %s, id %s", what, incident, exc_info=error)
    return ServiceError(f"the service failed on this request; its log has the details under id {incident}")
