"""What is refused before it is a request that anything could answer: no HTTP, or beyond a bound of the connection."""

from __future__ import annotations

from leanserve.http.limits import HttpLimits
from leanserve.http.messages import Response, error_body, json_response


class Refused(Exception):
    """Ends a connection, with a reply of this status. `bound` is the key below `limits` that was met, if it was one."""

    def __init__(self, status: int, code: str, text: str, bound: str = "") -> None:
        super().__init__(text)
        self.status = status
        self.code = code
        self.bound = bound

    @property
    def kind(self) -> str:
        """What is told apart in the log."""
        return self.bound or self.code

    def response(self) -> Response:
        """The reply. Where it is the moment that was wrong, and not the request, it says when to come again."""
        headers = [(b"retry-after", b"1")] if self.status == 503 else []
        return json_response(error_body(str(self), self.code), headers, self.status)


def no_http(reason: object) -> Refused:
    """It is no request that can be read in one way only."""
    return Refused(400, "bad_input", f"this is no valid HTTP/1.1 request: {reason}")


def check_head(url: bytes, headers: list[tuple[bytes, bytes]], limits: HttpLimits) -> None:
    """Raise `Refused` if a head, whole or in part, is beyond a bound."""
    if len(url) > limits.url_bytes:
        raise Refused(414, "url_too_long", f"the URL has more than {limits.url_bytes} bytes", "url_bytes")
    if len(headers) > limits.headers:
        raise Refused(431, "head_too_large", f"there are more than {limits.headers} headers", "headers")
    if sum(len(name) + len(value) for name, value in headers) > limits.header_bytes:
        raise headers_too_large(limits)


def headers_too_large(limits: HttpLimits) -> Refused:
    """Headers or trailers have too many bytes."""
    text = f"the headers have more than {limits.header_bytes} bytes"
    return Refused(431, "head_too_large", text, "header_bytes")


def check_coding(headers: list[tuple[bytes, bytes]]) -> None:
    """Raise `Refused` for a body that is coded for transfer in another way than in chunks (RFC 9112, 6.1)."""
    for name, value in headers:
        if name == b"transfer-encoding" and value.strip().lower() != b"chunked":
            text = "no transfer coding is known but chunked; compress the body by Content-Encoding instead"
            raise Refused(501, "not_implemented", text)


def too_slow(part: str, bound: str, seconds: float) -> Refused:
    """A handshake, a head or a body did not come in time."""
    whole = part if part == "handshake" else f"{part} of the request"
    text = f"the {whole} did not arrive within {seconds:g} s (limits.{bound})"
    return Refused(408, "request_timeout", text, bound)
