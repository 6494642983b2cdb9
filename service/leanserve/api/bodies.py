"""The body of a request as it was before it was compressed: read and bounded in one place for all fronts."""

from __future__ import annotations

from leanserve.api.service import Service
from leanserve.http.content_encoding import encoding_of_body, inflate
from leanserve.http.messages import Request, Response, disconnect_check, read_body
from leanserve.serving.decoding import off_loop
from leanserve.serving.session import Answered, Session


async def plain_body(request: Request, limit: int) -> bytes | memoryview:
    """The whole request body, inflated if its `Content-Encoding` says that it is compressed.

    Raises:
        BodyTooLarge: above `limit` bytes, compressed or inflated. UnsupportedMediaType: an unknown encoding.
        BadInput: the compressed body is damaged. ClientGone: the client left while sending.
    """
    if request.body is not None:
        return request.body
    encoding = encoding_of_body(request.header(b"content-encoding"))
    body = await read_body(request, limit)
    return body if encoding is None else await off_loop(inflate, bytes(body), encoding, limit)


def how_headers(answered: Answered) -> list[tuple[bytes, bytes]]:
    """Who answered and how it ran, where a body has no place for it."""
    told = answered.how_it_ran().items()
    how = [(f"x-{name.replace('_', '-')}".encode(), str(value).encode()) for name, value in told]
    return [(b"x-variant", answered.variant.name.encode()), *how]


class HttpSession(Session[Response]):
    """The part of a session that all fronts over HTTP share: the body, and whether the client is still there."""

    def __init__(self, service: Service, request: Request) -> None:
        self.fleet = service.fleet
        self.http = request
        self.body: bytes | memoryview | None = request.body
        self.is_disconnected = disconnect_check(request.receive)
        self.body_limit = service.config.limits.body_bytes

    async def read(self) -> None:
        """Read the body. Raises as `plain_body`."""
        self.body = await plain_body(self.http, self.body_limit)
