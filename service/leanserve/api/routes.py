"""Raw ASGI in front of FastAPI: predictions and the Open Inference Protocol take the short way, the rest the app.

FastAPI's routing, dependency injection and response models cost more than a small model's inference. A path is one
look-up in a table; errors become the same bodies as everywhere (`wire.error_body`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from leanserve.api.caveats import caveat_headers
from leanserve.api.openai.embeddings import embeddings_route
from leanserve.api.openai.models import MODELS, ModelList
from leanserve.api.service import Service
from leanserve.api.v1.predict import predict
from leanserve.api.v2.rest import no_such_path, open_inference_routes
from leanserve.errors import ClientGone, MethodNotAllowed, NotFound, ServiceError
from leanserve.http.exchange import Answer
from leanserve.http.messages import AsgiScope, Receive, Request, Response, Route, Send, send_response
from leanserve.serving.incidents import unexpected_failure
from leanserve.serving.session import refuse_unrouted

App = Callable[[AsgiScope, Receive, Send], Awaitable[None]]
PREDICT, EMBEDDINGS = "/v1/predict", "/v1/embeddings"


class HotPath:
    """An ASGI app that answers what is in its table, and passes all else on to `app`."""

    def __init__(self, service: Service, app: App) -> None:
        self._fleet = service.fleet
        self._app = app
        self._caveats = caveat_headers(service.base.caveats)
        self._models = ModelList(service)
        self._routes = {
            PREDICT: Route("POST", "prediction", partial(predict, service)),
            EMBEDDINGS: embeddings_route(service),
            MODELS: self._models.all,
            **open_inference_routes(service),
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
            route = self._refusing(route, _wrong_method(path, method, route.method))
        # ASGI gives the names in lower case. A dict costs less than a second look through the list.
        reply = await self.answer(route, Request(path, dict(scope["headers"]), receive))
        if reply is not None:
            await send_response(send, reply)
        return None

    def _route_below(self, method: str, path: str) -> Route | None:
        """The route of a path that is in no table, but below one that is answered here."""
        if path.startswith("/v2/"):
            unknown = Route(method, "prediction" if path.endswith("/infer") else "description", _nothing)
            return self._refusing(unknown, no_such_path(self._fleet, path))
        return self._models.one if path.startswith(f"{MODELS}/") else None

    def find(self, method: bytes, path: bytes) -> Answer | None:
        """What answers predictions on this path by this method."""
        return self._predictions.get(path) if method == b"POST" else None

    async def answer(self, route: Route, request: Request) -> Response | None:
        """The reply to a request, also where it is refused or fails; `None` where nobody is left to get it."""
        try:
            reply = await route.answer(request)
        except ClientGone:
            return None
        except ServiceError as error:
            return route.refuse(error)
        except Exception as error:
            return route.refuse(unexpected_failure(error, f"a request to {request.path}"))
        if self._caveats and route.counts == "prediction":
            return Response(reply.body, (*reply.headers, *self._caveats), reply.status)
        return reply

    def _refusing(self, route: Route, error: ServiceError) -> Route:
        """A route that only tells why; of a prediction that is counted, too."""

        async def answer(_: Request) -> Response:
            if route.counts == "prediction":
                refuse_unrouted(self._fleet, error)
            raise error

        return route._replace(answer=answer)


async def _nothing(request: Request) -> Response:
    raise NotFound(f"no such path: {request.path[:200]}")


def _wrong_method(path: str, method: str, right: str) -> MethodNotAllowed:
    allow = "GET, HEAD" if right == "GET" else right
    return MethodNotAllowed(f"{path} takes {right}, not {method}", allow)
