"""The table of endpoints, in front of FastAPI, which describes them; what is not in it is for FastAPI to answer.

A path is one look-up in a table; errors become the same bodies as everywhere (`http.messages.error_body`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from leanserve.api.audit import remember_caller
from leanserve.api.caveats import caveat_headers
from leanserve.api.cors import Grants
from leanserve.api.endpoint import Endpoint
from leanserve.api.health import health_endpoints
from leanserve.api.openai.embeddings import embeddings_endpoint
from leanserve.api.openai.models import MODELS, ModelList
from leanserve.api.page_files import page_endpoints
from leanserve.api.service import Service
from leanserve.api.v1.experiment import ExperimentEndpoints
from leanserve.api.v1.predict import predict_endpoint
from leanserve.api.v2.rest import no_such_path, open_inference_endpoints
from leanserve.errors import ClientGone, MethodNotAllowed, NotFound, ServiceError
from leanserve.http.exchange import Answer
from leanserve.http.messages import AsgiScope, Receive, Request, Response, Route, Send, send_response
from leanserve.serving.incidents import unexpected_failure
from leanserve.serving.session import unrouted

App = Callable[[AsgiScope, Receive, Send], Awaitable[None]]


def endpoints_of(service: Service) -> list[Endpoint]:
    """The table: every endpoint that FastAPI does not answer."""
    return [
        *health_endpoints(service),
        predict_endpoint(service),
        embeddings_endpoint(service),
        *ExperimentEndpoints(service).endpoints(),
        *ModelList(service).endpoints(),
        *open_inference_endpoints(service),
        *page_endpoints(),
    ]


class HotPath:
    """An ASGI app that answers what is in its table, and passes all else on to `app`."""

    def __init__(self, service: Service, endpoints: list[Endpoint], app: App) -> None:
        self._fleet = service.fleet
        self._app = app
        self._caveats = caveat_headers(service.base.caveats)
        self._access = service.access
        self._models = ModelList(service)
        self._experiments = service.experiments
        self._routes: dict[str, Route] = {}
        self._by_method: dict[tuple[str, str], Route] = {}
        """Where a path takes several methods, the routes of all but the first."""
        for path, route in (row for item in endpoints for row in item.routes.items()):
            if self._routes.setdefault(path, route) is not route:
                self._by_method[route.method, path] = route
        self.predictions: dict[bytes, Answer] = {
            path.encode(): partial(self.answer, route)
            for path, route in self._routes.items()
            if route.role == "predict"
        }
        """By the raw path, what is POSTed there and answered on the short way of a connection."""

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path, method = scope["path"], scope["method"]
        route = self._routes.get(path) or self._route_below(method, path)
        if route is None:
            return await self._app(scope, receive, send)
        if method != route.method and not (method == "HEAD" and route.method == "GET"):
            methods = [route.method, *(other for other, where in self._by_method if where == path)]
            route = self._by_method.get((method, path)) or self._refusing(
                route, partial(_wrong_method, path, method, methods)
            )
        # ASGI gives the names in lower case. A dict costs less than a second look through the list.
        request = Request(path, dict(scope["headers"]), receive, query=scope["query_string"])
        if route.role == "admin":
            remember_caller(None, (scope.get("client") or ("unknown",))[0])
        reply = await self.answer(route, request)
        if reply is not None:
            await send_response(send, reply)
        return None

    def _route_below(self, method: str, path: str) -> Route | None:
        """The route of a path that is in no table, but below one that is answered here."""
        if path.startswith("/v2/"):
            unknown = Route(method, "predict" if path.endswith("/infer") else "read", _nothing)
            return self._refusing(unknown, partial(no_such_path, self._fleet, path))
        return self._models.one if path.startswith(f"{MODELS}/") else None

    async def answer(self, route: Route, request: Request) -> Response | None:
        """The reply to a request, also where it is refused or fails; `None` where nobody is left to get it."""
        if self._access.keyed or route.role == "admin":
            try:
                self._admit(route, request)
            except ServiceError as error:
                return route.refuse(error)
        try:
            reply = await route.answer(request)
        except ClientGone:
            return None
        except ServiceError as error:
            reply = route.refuse(error)
        except Exception as error:
            reply = route.refuse(unexpected_failure(error, f"a request to {request.path}"))
        if (told := self._experiments.headers or self._caveats) and route.role == "predict":
            if told is not self._caveats:
                told = (*told, *self._caveats)
            return Response(reply.body, (*reply.headers, *told), reply.status)
        return reply

    def _admit(self, route: Route, request: Request) -> None:
        """Let who may have it pass; a prediction that is refused is counted."""
        try:
            name = self._access.admit_over_http(route.role, request.headers)
        except ServiceError as error:
            if route.role == "predict":
                unrouted(self._fleet, error)
            raise
        if name is not None and route.role == "admin":
            remember_caller(name)

    def _refusing(self, route: Route, refusal: Callable[[], ServiceError]) -> Route:
        """A route that only tells why; of a prediction that is counted, too."""

        async def answer(_: Request) -> Response:
            raise unrouted(self._fleet, refusal()) if route.role == "predict" else refusal()

        return route._replace(answer=answer)


class CrossOriginHotPath(HotPath):
    """The outermost ASGI app where pages of other origins are among the clients."""

    def __init__(self, service: Service, endpoints: list[Endpoint], app: App) -> None:
        super().__init__(service, endpoints, partial(self._ask_app, app))
        self._grants = Grants(service.config.cors, service.fleet.sticky_header)

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "OPTIONS":
            preflight = self._grants.preflight(dict(scope["headers"]))
            if preflight is not None:
                return await send_response(send, preflight)
        return await super().__call__(scope, receive, send)

    async def answer(self, route: Route, caller: Request) -> Response | None:
        """The reply to a request, with what its browser wants to know."""
        reply = await super().answer(route, caller)
        if reply is None:
            return None
        return reply._replace(headers=(*reply.headers, *self._grants.headers(caller.headers)))

    async def _ask_app(self, app: App, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """The same for what `app` answers."""
        if scope["type"] != "http":
            return await app(scope, receive, send)
        headers = self._grants.headers(dict(scope["headers"]))

        async def send_granted(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = message | {"headers": [*message.get("headers", ()), *headers]}
            await send(message)

        return await app(scope, receive, send_granted)


async def _nothing(request: Request) -> Response:
    raise NotFound(f"no such path: {request.path[:200]}")


def _wrong_method(path: str, method: str, right: Sequence[str]) -> MethodNotAllowed:
    allow = ", ".join("GET, HEAD" if each == "GET" else each for each in right)
    return MethodNotAllowed(f"{path} takes {' and '.join(right)}, not {method}", allow)
