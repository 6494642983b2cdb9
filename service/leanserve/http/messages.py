"""The little HTTP that the hot path needs, straight on ASGI: read a bounded body, see a client leave, send a reply."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal, NamedTuple

import orjson

from leanserve.contracts import Json
from leanserve.errors import BadInput, BodyTooLarge, ClientGone, MethodNotAllowed, ServiceError, Unauthorized
from leanserve.request_identity import RequestIdentity

AsgiScope = dict[str, Any]
Receive = Callable[[], Any]
Send = Callable[[Any], Any]
Headers = Iterable[tuple[bytes, bytes]]
_LONGEST = 2000
"""Characters of an error's text that are sent."""


@dataclass(slots=True)
class Request:
    """One request.

    The names in `headers` are in lower case. `body` is there where it came with the head: whole, not compressed, and
    not above the limit. Else it is to be read by `receive`, as ASGI has it; `begun` is what is known of it before. The
    headers of its `identity` go into the response. `query` is what follows the `?` of the address, as it was sent.
    """

    path: str
    headers: Mapping[bytes, bytes]
    receive: Receive
    body: bytes | None = None
    begun: bytes = b""
    identity: RequestIdentity = ()
    query: bytes = b""

    def header(self, name: bytes) -> str | None:
        """The header of that (lower-case) name, decoded; `None` if absent or empty."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1").strip() or None


class Response(NamedTuple):
    """The body of a reply and its headers, but for the content length."""

    body: bytes
    headers: Headers
    status: int = 200


def error_response(error: ServiceError) -> Response:
    """The reply to a request that was refused or failed."""
    headers = [(name.encode(), value.encode()) for name, value in error_headers(error).items()]
    return json_response(error_body(str(error), error.code), headers, error.status)


Role = Literal["open", "predict", "read", "admin"]
"""What a key must have been given to be answered; `open` is for everybody."""


class Route(NamedTuple):
    """What answers a path, by which method (GET includes HEAD), and for whom. Metrics count what is of role `predict`.

    `refuse` writes what is not answered; only a foreign protocol has a shape of its own for that.
    """

    method: str
    role: Role
    answer: Callable[[Request], Awaitable[Response]]
    refuse: Callable[[ServiceError], Response] = error_response


def json_response(body: Json, headers: Headers = (), status: int = 200) -> Response:
    """A reply with a JSON body, numbers and arrays of numpy included."""
    return Response(
        orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY),
        [(b"content-type", b"application/json"), *headers],
        status,
    )


async def read_body(caller: Request, limit: int) -> bytes | memoryview:
    """The whole request body, chunked or not, as it was sent, if it did not come with the head.

    Raises:
        BodyTooLarge: above `limit` bytes, told before reading where the length is declared.
        ClientGone: the client left while sending.
    """
    declared = caller.header(b"content-length")
    if declared is not None and not declared.isdecimal():
        raise BadInput(f"the Content-Length header is not a number: {declared!r}")
    if declared is not None and int(declared) > limit:
        raise BodyTooLarge(f"the body has {declared} bytes; at most {limit} are taken (limits.body_bytes)")
    _acknowledge_head(caller.receive)
    message = await caller.receive()
    if not message.get("more_body") and message["type"] == "http.request":
        return _bounded(message.get("body", b""), limit)
    parts: list[bytes] = []
    size = 0
    while message["type"] == "http.request":
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise _too_large(limit)
        if not message.get("more_body"):
            return b"".join(parts)
        message = await caller.receive()
    raise ClientGone("the client left while sending its body")


def _acknowledge_head(receive: Receive) -> None:
    """Where the head of a request came without its body: tell the client at once that it arrived.

    Linux would wait 40 ms with that, and a client that writes head and body apart (without TCP_NODELAY) holds the body
    back until it hears. Only uvicorn tells what is needed to know.
    """
    cycle: Any = getattr(receive, "__self__", None)
    if getattr(cycle, "more_body", False) and not getattr(cycle, "body", True):
        acknowledge(cycle.transport)


def acknowledge(transport: asyncio.BaseTransport) -> None:
    """Acknowledge what was received on a connection now rather than in 40 ms."""
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family != socket.AF_UNIX and hasattr(socket, "TCP_QUICKACK"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def _bounded(body: bytes | memoryview, limit: int) -> bytes | memoryview:
    if len(body) > limit:
        raise _too_large(limit)
    return body


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body has more than {limit} bytes (limits.body_bytes)")


def disconnect_check(receive: Receive) -> Callable[[], bool]:
    """A cheap question, askable from any thread: did the client of this request leave?

    ASGI only offers to wait for a disconnect, which would cost a task per request. uvicorn's `receive` is a method of
    the object that knows; under another server the answer is always no, and rows of leavers are computed in vain.
    """
    cycle = getattr(receive, "__self__", None)
    if cycle is None or not hasattr(cycle, "disconnected"):
        return lambda: False
    return lambda: cycle.disconnected


async def send_response(send: Send, reply: Response) -> None:
    """Send a reply in one go. For a HEAD request, too: the server leaves the body out."""
    length = [] if reply.status == HTTPStatus.NOT_MODIFIED else [(b"content-length", b"%d" % len(reply.body))]
    headers = [*length, *reply.headers]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})


def error_body(text: str, code: str) -> Json:
    """The body of every failing reply, on every path."""
    return {"error": clipped(text), "code": code}


def clipped(text: str) -> str:
    """A text that may quote what a client sent, which may be megabytes of it."""
    left = len(text) - _LONGEST
    return text if left <= 0 else f"{text[:_LONGEST]}... ({left} more characters)"


def error_headers(error: ServiceError) -> dict[str, str]:
    """`Retry-After` in whole seconds, at least 1, where the error knows it; `Allow` where the method is wrong;
    `WWW-Authenticate` where a key is; the variant that was to answer."""
    headers = {} if error.variant is None else {"x-variant": error.variant}
    if isinstance(error, MethodNotAllowed):
        headers["allow"] = error.allow
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = 'Bearer realm="leanserve"'
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return headers
