"""The FastAPI app for everything that is not on the hot path: variants, metrics; and its error mapper.

`create_app` returns the hot path in front of it. Every error on every path is `{"error": text, "code": code}`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from leanserve import __version__
from leanserve.api.endpoint import Endpoint, declared_routes
from leanserve.api.guarded_app import GuardedApp
from leanserve.api.live_stream import EVENT_STREAM, LiveStream
from leanserve.api.metrics_page import MetricsPage
from leanserve.api.routes import CrossOriginHotPath, HotPath, endpoints_of
from leanserve.api.service import Service
from leanserve.api.v1.base import base_document
from leanserve.contracts import Json
from leanserve.errors import ServiceError
from leanserve.http.messages import error_body, error_headers
from leanserve.serving.fleet import Fleet
from leanserve.serving.incidents import details_in_log


class _EventStreamResponse(StreamingResponse):
    """So that `/openapi.json` tells the type."""

    media_type = EVENT_STREAM


class _Description:
    """What `/openapi.json` tells; a thread writes it, once, when somebody asks for it first."""

    def __init__(self, write: Callable[[], bytes]) -> None:
        self._write = write
        self._writing: asyncio.Task[bytes] | None = None

    async def answer(self) -> Response:
        if self._writing is None:
            self._writing = asyncio.create_task(asyncio.to_thread(self._write))
        return Response(await asyncio.shield(self._writing), media_type="application/json")


def create_app(service: Service) -> HotPath:
    """The whole HTTP service."""
    fleet, page, plans = service.fleet, MetricsPage(service.fleet.metrics), service.fleet.plans
    stream = LiveStream(service.live.snapshot, is_over=lambda: fleet.draining or fleet.plans is not plans)
    app = FastAPI(title="leanserve", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _unexpected)

    def add_route(path: str, endpoint: Callable[..., Any], response: type[Response] = JSONResponse) -> None:
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None, response_class=response)
        app.add_api_route(path, endpoint, methods=["HEAD"], response_model=None, include_in_schema=False)

    async def variants() -> Json:
        """Every variant with its state, quality and share of the traffic; those that do not serve with their reason."""
        return {
            "model": fleet.name,
            "caveats": service.base.caveats,
            "postprocess": service.post.described(),
            "variants": [_variant(fleet, name) for name in fleet.plans],
        }

    async def base() -> JSONResponse:
        """What the base takes and gives: kind of input, media types, tensors, labels; caveats."""
        return JSONResponse(base_document(service.base))

    async def report() -> Response:
        """What the build has measured of every variant, pass by pass, and which is the cheapest that answers right."""
        return Response(orjson.dumps(fleet.report), media_type="application/json")  # infinity becomes null

    async def live_stream() -> Response:
        """The numbers of `GET /v1/live` once a second, as server-sent events, until the service drains or reloads."""
        return _EventStreamResponse(stream.listen(), headers={"cache-control": "no-store"})

    async def metrics(request: Request) -> Response:
        """Prometheus metrics."""
        return await page.answer(request)

    add_route("/v1/variants", variants)
    add_route("/v1/base", base)
    add_route("/v1/report", report)
    add_route("/metrics", metrics, PlainTextResponse)
    app.add_api_route("/v1/live/stream", live_stream, response_class=_EventStreamResponse)
    endpoints = endpoints_of(service)
    description = _Description(partial(_openapi, app, endpoints))
    app.add_api_route("/openapi.json", description.answer, include_in_schema=False)
    hot_path = CrossOriginHotPath if service.config.cors.origins else HotPath
    return hot_path(service, endpoints, GuardedApp(app, service.access))


def _variant(fleet: Fleet, name: str) -> Json:
    facts, variant = fleet.plans[name].facts, fleet.variants.get(name)
    (state, reason), weights = fleet.status_of[name], fleet.weights
    return {
        "name": name,
        "state": state,
        "reason": reason or None,
        "undecided": facts.doubt or None,
        "parents": facts.parents,
        "passes": facts.passes,
        "simulated": facts.simulated,
        "backend": variant.backend.name if variant else None,
        "traffic_share": weights[name] / sum(weights.values()) if name in weights else 0.0,
        "batch_rows": variant.batcher.limits.max_rows if variant else None,
        "memory_rows": variant.running.memory_rows if variant else None,
        "batch_ms": {rows: round(s * 1000, 3) for rows, s in variant.costs.table().items()} if variant else None,
        "quality": facts.quality or None,
        "measured_on": {"cpu": facts.cpu, "threads": facts.threads},
    }


async def _service_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return JSONResponse(error_body(str(error), error.code), error.status, error_headers(error))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    texts = {
        404: f"no such path: {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }
    codes = {404: "not_found", 405: "method_not_allowed"}
    text, code = texts.get(error.status_code, str(error.detail)), codes.get(error.status_code, "http_error")
    return JSONResponse(error_body(text, code), error.status_code, error.headers)


async def _validation_error(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body(str(error), "bad_input"), 422)


async def _unexpected(_request: Request, _error: Exception) -> JSONResponse:
    # Starlette raises it again afterwards, by which the server logs it.
    return JSONResponse(error_body(f"the service failed on this request; {details_in_log()}", ServiceError.code), 500)


def _openapi(app: FastAPI, endpoints: list[Endpoint]) -> bytes:
    """FastAPI's schema of its own paths and of those that are answered before it is asked; takes tens of ms."""
    routes = [*app.routes, *declared_routes(endpoints)]
    return orjson.dumps(get_openapi(title=app.title, version=app.version, routes=routes))
