"""The FastAPI app for everything that is not on the hot path: health, variants, metrics; and its error mapper.

`create_app` returns the hot path in front of it. Every error on every path is `{"error": text, "code": code}`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from leanserve import __version__
from leanserve.api.cors import CrossOriginHotPath
from leanserve.api.openapi import hot_paths
from leanserve.api.routes import HotPath
from leanserve.contracts import Json
from leanserve.errors import ServiceError
from leanserve.http.messages import error_body, error_headers
from leanserve.serving.fleet import Fleet


def create_app(fleet: Fleet) -> HotPath:
    """The whole HTTP service over an opened fleet, which is started on the loop that serves."""
    app = FastAPI(title="leanserve", version=__version__)
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _unexpected)

    def add_route(path: str, endpoint: Callable[..., Any], response: type[Response] = JSONResponse) -> None:
        app.add_api_route(path, endpoint, methods=["GET"], response_model=None, response_class=response)
        app.add_api_route(path, endpoint, methods=["HEAD"], response_model=None, include_in_schema=False)

    async def healthz() -> Json:
        """200 while the process lives."""
        return {"live": True}

    async def readyz() -> Json:
        """200 when variants are built, gated and warm; 503 once draining has begun, and if all were unloaded."""
        fleet.check_ready()
        return {"ready": True}

    async def variants() -> Json:
        """Every variant with its state, quality and share of the traffic; those that do not serve with their reason."""
        return {
            "model": fleet.base.name,
            "caveats": fleet.base.caveats,
            "variants": [_variant(fleet, name) for name in fleet.reports],
        }

    async def metrics(request: Request) -> Response:
        """Prometheus metrics."""
        content, content_type = fleet.metrics.render(request.headers.get("accept", ""))
        return Response(content, headers={"content-type": content_type})

    add_route("/healthz", healthz)
    add_route("/readyz", readyz)
    add_route("/v1/variants", variants)
    add_route("/metrics", metrics, PlainTextResponse)
    app.openapi = lambda: _openapi(app, fleet)  # type: ignore[method-assign]
    return CrossOriginHotPath(fleet, app) if fleet.config.cors.origins else HotPath(fleet, app)


def _variant(fleet: Fleet, name: str) -> Json:
    report, variant = fleet.reports[name], fleet.variants.get(name)
    (state, reason), weights = fleet.status_of[name], fleet.weights
    return {
        "name": name,
        "state": state,
        "reason": reason or None,
        "parents": report.parents,
        "passes": [manifest.kind for manifest in report.ancestry[1:]],
        "simulated": [manifest.kind for manifest in report.ancestry if manifest.simulated],
        "backend": variant.backend.name if variant else None,
        "traffic_share": weights[name] / sum(weights.values()) if name in weights else 0.0,
        "batch_rows": variant.batcher.limits.max_rows if variant else None,
        "memory_rows": variant.running.memory_rows if variant else None,
        "batch_ms": {rows: round(s * 1000, 3) for rows, s in variant.costs.table().items()} if variant else None,
        "quality": report.quality.model_dump(),
        "measured_on": {"cpu": report.ancestry[-1].cpu, "threads": report.ancestry[-1].threads},
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
    return JSONResponse(error_body("the service failed on this request; see its log", ServiceError.code), 500)


def _openapi(app: FastAPI, fleet: Fleet) -> dict[str, Any]:
    """FastAPI's schema plus the paths that it does not see."""
    from fastapi.openapi.utils import get_openapi

    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schema["paths"] |= hot_paths(fleet)
    return schema
