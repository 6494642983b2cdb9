"""The OpenAPI description of the paths that FastAPI does not see: predictions and the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from leanserve.api.openai.models import gives_embeddings, served_models
from leanserve.api.service import Service
from leanserve.codecs.image_formats import FORMAT_NAMES, media_types
from leanserve.codecs.open_inference import JSON_LENGTH_HEADER
from leanserve.codecs.tensors import Port, ports
from leanserve.contracts import Json, ModelSpec
from leanserve.serving.fleet import Fleet

_ERROR = {
    "type": "object",
    "required": ["error", "code"],
    "properties": {"error": {"type": "string"}, "code": {"type": "string"}},
}
_OPENAI_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_FAILURES = {
    "400": "something in the request is wrong",
    "404": "no such model, version or path",
    "405": "wrong verb",
    "413": "the body is too large",
    "415": "content type or encoding is not taken",
    "429": "refused at the door; `Retry-After` tells when to come again",
    "500": "the model failed on this request",
    "503": "starting, draining, memory ran out, or the variant was excluded by its gate or is not loaded",
    "504": "waited too long in the queue",
}
_SMALL_ROW = 256
"""Most elements of a row that an example shows."""
_FILE = {"type": "string", "format": "binary"}
_BODIES = {
    **{kind: {"schema": _FILE} for kind in (*media_types(FORMAT_NAMES), "image/*", "application/octet-stream")},
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "properties": {"file": _FILE},
            "additionalProperties": _FILE,
            "description": "one file per part, under any names; several files get a list of predictions",
        }
    },
}
"""What a prediction takes by these media types; others have no schema."""
_INDEX = {"type": "object", "properties": {"ready": {"type": "boolean"}}}


def hot_paths(service: Service) -> dict[str, Any]:
    """The `paths` of the schema."""
    fleet = service.fleet
    media: dict[str, Json] = {media_type: _BODIES.get(media_type, {}) for media_type in service.base.codec.media_types}
    choice = _headers(
        {"x-variant": "answer with this variant"}
        | {service.config.traffic.sticky_header: "requests with the same value get the same variant"}
    )
    length = _headers({JSON_LENGTH_HEADER: "bytes of JSON before the binary tensors; 0: the body is the only tensor"})
    paths: dict[str, Any] = {
        "/v1/predict": {"post": _operation("Predict", media, choice)},
        "/v1/models": {"get": _operation("The models, as in OpenAI's API", error=_OPENAI_ERROR)},
        "/v2": {"get": _operation("Server metadata")},
        "/v2/health/live": {"get": _operation("Is the process alive")},
        "/v2/health/ready": {"get": _operation("Are all variants warm, and is the service not draining")},
        "/v2/models/stats": {"get": _operation("Statistics of all variants")},
        "/v2/repository/index": {
            "post": _operation("The variants and their states", {"application/json": {"schema": _INDEX}})
        },
    }
    if service.config.model_control == "explicit":
        paths |= _swaps(fleet)
    if gives_embeddings(service.base):
        paths["/v1/embeddings"] = {
            "post": _operation("Embeddings, as of OpenAI's API", _embeddings(service), choice, _OPENAI_ERROR)
        }
        named = [_named("model", served_models(fleet))]
        paths["/v1/models/{model}"] = {"get": _operation("One model, as in OpenAI's API", None, named, _OPENAI_ERROR)}
    infer = {"application/json": {"schema": _infer(service.base.spec)}, "application/octet-stream": {}}
    for version, named in (("", []), ("/versions/{version}", [_named("version", list(fleet.variants))])):
        path, own = f"/v2/models/{{model}}{version}", [_named("model", [fleet.name]), *named]
        for name, summary in (("", "Metadata"), ("/config", "Configuration"), ("/stats", "Statistics")):
            paths[path + name] = {"get": _operation(f"{summary} of the model", parameters=own)}
        paths[f"{path}/ready"] = {"get": _operation("Is the model ready", parameters=own)}
        paths[f"{path}/infer"] = {"post": _operation("Infer", infer, own + choice + length)}
    return paths


def _swaps(fleet: Fleet) -> dict[str, Any]:
    """The paths that load and unload the model or a version of it."""
    media = {"application/json": {"schema": {"type": "object", "properties": {"parameters": {"type": "object"}}}}}
    model = _named("model", [fleet.name])
    version = _named("version", list(fleet.plans))
    return {
        f"/v2/repository/models/{{model}}{path}/{swap}": {"post": _operation(f"{swap.title()} {what}", media, own)}
        for path, what, own in (("", "the model", [model]), ("/versions/{version}", "a variant", [model, version]))
        for swap in ("load", "unload")
    }


def _embeddings(service: Service) -> Json:
    """The media of a request for embeddings."""
    fleet = service.fleet
    name, width = fleet.name, service.base.spec.outputs[0].shape[0]
    text, ids = {"type": "string"}, {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
    texts, rows = ({"type": "array", "items": item, "minItems": 1} for item in (text, ids))
    taken: Json = {"anyOf": [text, texts]}
    if service.config.embeddings.token_ids == "own":
        taken = {"anyOf": [text, texts, ids, rows], "description": "texts, or token ids with the special ones"}
    properties = {
        "input": taken,
        "model": {"enum": served_models(fleet)},
        "encoding_format": {"enum": ["float", "base64"], "default": "float"},
        "dimensions": {"const": width},
        "user": {"type": "string", "description": "not used"},
    }
    schema = {
        "type": "object",
        "required": ["input", "model"],
        "properties": properties,
        "additionalProperties": False,
        "example": {"input": ["one text", "another"], "model": name},
    }
    return {"application/json": {"schema": schema}}


def _infer(spec: ModelSpec) -> Json:
    """The schema of an infer request to this model; with an example where its rows are small."""
    inputs, outputs = ports(spec.inputs).values(), ports(spec.outputs)
    schema = {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "parameters": {"type": "object"},
            "inputs": {"type": "array", "items": {"anyOf": [_tensor(port) for port in inputs]}},
            "outputs": {
                "type": "array",
                "items": {"type": "object", "required": ["name"], "properties": {"name": {"enum": list(outputs)}}},
            },
        },
    }
    if all(port.datatypes[0].json_types and prod(map(abs, port.shape)) <= _SMALL_ROW for port in inputs):
        schema["example"] = {"inputs": [_zeros(port) for port in inputs]}
    return schema


def _tensor(port: Port) -> Json:
    sizes = [{"type": "integer", "minimum": 1} if size < 0 else {"const": size} for size in port.shape]
    return {
        "type": "object",
        "required": ["name", "shape", "datatype"],
        "properties": {
            "name": {"const": port.name},
            "shape": {"type": "array", "prefixItems": sizes, "minItems": len(sizes), "maxItems": len(sizes)},
            "datatype": {"enum": [datatype.name for datatype in port.datatypes]},
            "parameters": {"type": "object"},
            "data": {"type": "array", "description": "nested like the shape, or flat"},
        },
    }


def _zeros(port: Port) -> Json:
    """One row of zeros; axes that vary have one element."""
    shape = [abs(size) for size in port.shape]
    zero: Json = {"BOOL": False, "BYTES": ""}.get(port.datatypes[0].name, 0)
    return {"name": port.name, "shape": shape, "datatype": port.datatypes[0].name, "data": [zero] * prod(shape)}


def _named(name: str, known: list[str]) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "enum": known}}


def _headers(texts: Mapping[str, str]) -> list[Json]:
    return [
        {"name": name, "in": "header", "schema": {"type": "string"}, "description": text}
        for name, text in texts.items()
    ]


def _operation(summary: str, media: Json = None, parameters: list[Json] | None = None, error: Json = _ERROR) -> Json:
    failures = {
        status: {"description": text, "content": {"application/json": {"schema": error}}}
        for status, text in _FAILURES.items()
    }
    operation = {"summary": summary, "responses": {"200": {"description": "the answer"}, **failures}}
    if parameters:
        operation["parameters"] = parameters
    if media:
        operation["requestBody"] = {"required": True, "content": media}
    return operation
