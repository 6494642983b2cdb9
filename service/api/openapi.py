"""The OpenAPI description of the paths that FastAPI does not see: predictions and the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.api.codecs.open_inference import JSON_LENGTH_HEADER
from service.contracts import Json
from service.serving.fleet import Fleet

_ERROR = {
    "type": "object",
    "required": ["error", "code"],
    "properties": {"error": {"type": "string"}, "code": {"type": "string"}},
}
_FAILURES = {
    "400": "something in the request is wrong",
    "404": "no such model, version or path",
    "405": "wrong verb",
    "413": "the body is too large",
    "415": "content type or encoding is not taken",
    "429": "refused at the door; `Retry-After` tells when to come again",
    "500": "the model failed on this request",
    "503": "draining, or the variant was excluded by its gate",
    "504": "waited too long in the queue",
}
_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "datatype": {"type": "string"},
        "parameters": {"type": "object"},
        "data": {},
    },
}
_INFER = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": {"type": "object"},
        "inputs": {"type": "array", "items": _TENSOR},
        "outputs": {"type": "array", "items": {"type": "object", "required": ["name"]}},
    },
}
_INDEX = {"type": "object", "properties": {"ready": {"type": "boolean"}}}


def hot_paths(fleet: Fleet) -> dict[str, Any]:
    """The `paths` of the schema."""
    media: dict[str, Json] = {media_type: {} for media_type in fleet.base.codec.media_types}
    choice = _headers(
        {"x-variant": "answer with this variant"}
        | {fleet.config.traffic.sticky_header: "requests with the same value get the same variant"}
    )
    length = _headers({JSON_LENGTH_HEADER: "bytes of JSON before the binary tensors; 0: the body is the only tensor"})
    paths: dict[str, Any] = {
        "/v1/predict": {"post": _operation("Predict", media, choice)},
        "/v2": {"get": _operation("Server metadata")},
        "/v2/health/live": {"get": _operation("Is the process alive")},
        "/v2/health/ready": {"get": _operation("Are all variants warm, and is the service not draining")},
        "/v2/models/stats": {"get": _operation("Statistics of all variants")},
        "/v2/repository/index": {
            "post": _operation("The variants and their states", {"application/json": {"schema": _INDEX}})
        },
    }
    infer = {"application/json": {"schema": _INFER}, "application/octet-stream": {}}
    for version, named in (("", []), ("/versions/{version}", [_named("version", list(fleet.reports))])):
        path, own = f"/v2/models/{{model}}{version}", [_named("model", [fleet.base.name]), *named]
        for name, summary in (("", "Metadata"), ("/config", "Configuration"), ("/stats", "Statistics")):
            paths[path + name] = {"get": _operation(f"{summary} of the model", parameters=own)}
        paths[f"{path}/ready"] = {"get": _operation("Is the model ready", parameters=own)}
        paths[f"{path}/infer"] = {"post": _operation("Infer", infer, own + choice + length)}
    return paths


def _named(name: str, known: list[str]) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "enum": known}}


def _headers(texts: Mapping[str, str]) -> list[Json]:
    return [
        {"name": name, "in": "header", "schema": {"type": "string"}, "description": text}
        for name, text in texts.items()
    ]


def _operation(summary: str, media: Json = None, parameters: list[Json] | None = None) -> Json:
    failures = {
        status: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
        for status, text in _FAILURES.items()
    }
    operation = {"summary": summary, "responses": {"200": {"description": "the answer"}, **failures}}
    if parameters:
        operation["parameters"] = parameters
    if media:
        operation["requestBody"] = {"required": True, "content": media}
    return operation
