"""One row of the table of endpoints: what answers a path, and what FastAPI generates `/openapi.json` from.

Predictions do not go through FastAPI: its routing, dependencies and response models cost more than a small model's
inference. They are declared to it all the same, by the parameters that a function of its own would have. FastAPI is
imported where it is needed: a server listens before that, too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple

from pydantic import BaseModel

from leanserve.api.service import Service
from leanserve.contracts import Json
from leanserve.http.messages import Route

if TYPE_CHECKING:
    from fastapi.routing import APIRoute

_NONE: Final[Mapping[str, Any]] = MappingProxyType({})
_FAILURES = {
    400: "something in the request is wrong",
    401: "no key, or one that nobody knows",
    403: "the key may not do this, or a web page of others asks for it",
    404: "no such model, version or path",
    405: "wrong verb",
    413: "the body is too large",
    415: "content type or encoding is not taken",
    429: "refused at the door, or the key was used too often; `Retry-After` tells when to come again",
    500: "the model failed on this request",
    503: "starting, draining, memory ran out, or the variant was excluded by its gate or is not loaded",
    504: "waited too long in the queue",
}


class ErrorReply(BaseModel):
    """What every failing reply is."""

    error: str
    code: str


class OpenAiErrorDetail(BaseModel):
    """What OpenAI's API says of a failure."""

    message: str
    type: Literal[
        "invalid_request_error", "authentication_error", "permission_error", "rate_limit_error", "server_error"
    ]
    param: str | None
    code: str


class OpenAiErrorReply(BaseModel):
    """A failing reply where clients of OpenAI's API ask."""

    error: OpenAiErrorDetail


class Declaration(NamedTuple):
    """What is told of an endpoint: what it `takes`, by name (`in_path`, `in_header`, `in_body`); bodies
    that are no JSON, by content type; what it `gives`, the shape in which it refuses, and answers that are no JSON."""

    summary: str
    takes: Mapping[str, Any] = _NONE
    media: Mapping[str, Json] = _NONE
    gives: Any = None
    refuses: type[BaseModel] = ErrorReply
    gives_media: Mapping[str, Json] = _NONE


class Endpoint(NamedTuple):
    """What answers a path. Where the path has parameters, `routes` are all the paths that it stands for.

    Without a declaration it answers, and nothing is told of it.
    """

    path: str
    routes: Mapping[str, Route]
    declared: Declaration | None = None


def endpoint(path: str, route: Route, declared: Declaration | None = None) -> Endpoint:
    """An endpoint whose path has no parameters."""
    return Endpoint(path, {path: route}, declared)


def one_of(values: Iterable[str | int]) -> Any:
    """The type of what is one of these values."""
    return Literal[tuple(values)]  # as `Literal["a", "b"]`


def in_header(name: str, text: str) -> Any:
    """What a request may say in a header."""
    from fastapi import Header

    return Annotated[str, Header(alias=name, description=text)]


def in_query(kind: Any, text: str) -> Any:
    """What a request may say behind the path."""
    from fastapi import Query

    return Annotated[kind, Query(description=text)]


def in_path(names: Sequence[str]) -> Any:
    """A part of the path that is one of these names."""
    from fastapi import Path

    return Annotated[str, Path(json_schema_extra={"enum": list(names)})]


def in_body(model: type[BaseModel]) -> Any:
    """A body in JSON."""
    from fastapi import Body

    return Annotated[model, Body()]


def which_variant(service: Service) -> Mapping[str, Any]:
    """The headers by which any prediction may choose its variant."""
    sticky = service.config.traffic.sticky_header
    return {
        "x_variant": in_header("x-variant", "answer with this variant"),
        "sticky": in_header(sticky, "requests with the same value get the same variant"),
    }


def declared_routes(endpoints: Sequence[Endpoint]) -> list[APIRoute]:
    """The endpoints as FastAPI knows them, to describe and never to call."""
    return [
        _declared(item.path, next(iter(item.routes.values())).method, item.declared)
        for item in endpoints
        if item.declared is not None
    ]


def _declared(path: str, method: str, declared: Declaration) -> APIRoute:
    from fastapi.routing import APIRoute

    def answered_elsewhere() -> None: ...  # only its signature is read

    parameters = [_parameter(name, annotation) for name, annotation in declared.takes.items()]
    answered_elsewhere.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": declared.refuses, "description": text} for status, text in _FAILURES.items()
    }
    # FastAPI would tell of a 422 of its own, which is a 400 here.
    refusals["default"] = {"model": declared.refuses, "description": "any other failure"}
    if declared.gives_media:
        refusals[200] = {"content": dict(declared.gives_media)}
    content = {"requestBody": {"required": True, "content": dict(declared.media)}} if declared.media else None
    return APIRoute(
        path,
        answered_elsewhere,
        methods=[method],
        name=declared.summary,
        summary=declared.summary,
        response_model=declared.gives,
        response_description="the answer",
        responses=refusals,
        openapi_extra=content,
    )


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    from fastapi.params import Header, Query

    may_be_left_out = isinstance(annotation.__metadata__[0], Header | Query)
    default = None if may_be_left_out else inspect.Parameter.empty
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
