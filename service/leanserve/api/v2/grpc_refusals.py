"""How a call over gRPC is refused: the status, the words and the trailing metadata that its client gets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import grpc

from leanserve.api.v2.grpc_answers import Context
from leanserve.errors import ServiceError
from leanserve.http.messages import clipped, error_headers
from leanserve.request_identity import CURRENT_REQUEST

_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    405: grpc.StatusCode.UNIMPLEMENTED,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


def grpc_status(status: int) -> grpc.StatusCode:
    """What gRPC calls that status of HTTP."""
    return _STATUS.get(status, grpc.StatusCode.INTERNAL)


class CallRefusal(NamedTuple):
    """What a client is told of an error.

    Not the error itself: what ends a call is kept by gRPC, with the frames that it passes, until the garbage collector
    looks. With an error in them its message of 16 MB would stay, and those of hundreds of others.
    """

    status: grpc.StatusCode
    text: str
    headers: Mapping[str, str]


def call_refusal(failure: ServiceError) -> CallRefusal:
    """What is told of this error."""
    return CallRefusal(grpc_status(failure.status), clipped(str(failure)), error_headers(failure))


async def refuse_call(refusal: CallRefusal, context: Context) -> Any:
    """End the call with it; the identity of the call is told, too."""
    identity = CURRENT_REQUEST.get() or ()
    told = [(name.decode(), value.decode()) for name, value in identity]
    context.set_trailing_metadata((*told, *refusal.headers.items()))
    return await context.abort(refusal.status, refusal.text)
