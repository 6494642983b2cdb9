"""The little HTTP that the hot path needs, straight on ASGI: read a bounded body, see a client leave, send a reply."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import orjson

from service.contracts import Json
from service.errors import BadInput, BodyTooLarge, ClientGone, ServiceError

Scope = dict[str, Any]
Receive = Callable[[], Any]
Send = Callable[[Any], Any]
Headers = Iterable[tuple[bytes, bytes]]


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of that (lower-case) name, decoded; `None` if absent or empty."""
    for key, value in scope["headers"]:
        if key == name:
            return value.decode("latin-1").strip() or None
    return None


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole request body, chunked or not.

    Raises:
        BodyTooLarge: above `limit` bytes, told before reading where the length is declared.
        ClientGone: the client left while sending.
    """
    declared = header(scope, b"content-length")
    if declared is not None and not declared.isdigit():
        raise BadInput(f"the Content-Length header is not a number: {declared!r}")
    if declared is not None and int(declared) > limit:
        raise BodyTooLarge(f"the body has {declared} bytes; at most {limit} are taken (limits.body_bytes)")
    message = await receive()
    if not message.get("more_body") and message["type"] == "http.request":
        return bytes(message.get("body", b""))
    parts: list[bytes] = []
    size = 0
    while message["type"] == "http.request":
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise BodyTooLarge(f"the body has more than {limit} bytes (limits.body_bytes)")
        if not message.get("more_body"):
            return b"".join(parts)
        message = await receive()
    raise ClientGone("the client left while sending its body")


def gone_check(receive: Receive) -> Callable[[], bool]:
    """A cheap question, askable from any thread: did the client of this request leave?

    ASGI only offers to wait for a disconnect, which would cost a task per request. uvicorn's `receive` is a method of
    the object that knows; under another server the answer is always no, and rows of leavers are computed in vain.
    """
    cycle = getattr(receive, "__self__", None)
    if cycle is None or not hasattr(cycle, "disconnected"):
        return lambda: False
    return lambda: cycle.disconnected


async def send_json(send: Send, status: int, body: Json, headers: Headers = ()) -> None:
    """Send a JSON reply in one go."""
    await send_bytes(send, status, orjson.dumps(body), b"application/json", headers)


async def send_bytes(send: Send, status: int, body: bytes, content_type: bytes, headers: Headers = ()) -> None:
    """Send a reply in one go."""
    fixed = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    await send({"type": "http.response.body", "body": body})


def error_body(text: str, code: str) -> Json:
    """The body of every failing reply, on every path."""
    return {"error": text, "code": code}


def error_headers(error: ServiceError) -> dict[str, str]:
    """`Retry-After` in whole seconds, at least 1, where the error knows it."""
    return {} if error.retry_after_s is None else {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
