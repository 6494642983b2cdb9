"""gzip and deflate, both ways, with a bound on what a body may inflate to.

A few kilobytes can inflate to gigabytes, so inflating stops at the limit, and what is above it is refused without ever
having been held. Both directions take milliseconds per megabyte: call them off the event loop.

A reply is compressed only where the client names exactly one encoding in `Accept-Encoding`, as `tritonclient` does when
told to. The list that HTTP libraries send by themselves (`gzip, deflate, br`) permits compression, it does not wish for
it; tensors hardly shrink, and compressing them costs more time than most networks would take to carry them.
"""

from __future__ import annotations

import gzip
import zlib
from typing import Literal

from leanserve.errors import BadInput, BodyTooLarge, UnsupportedMediaType

Encoding = Literal["gzip", "deflate"]
_ENCODINGS: dict[str, Encoding] = {"gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate"}
_GZIP = 16 + zlib.MAX_WBITS
_FAST = 1
_LONGEST = 1000
"""Characters of a header that are read."""


def encoding_of_body(header: str | None) -> Encoding | None:
    """What `Content-Encoding` says, `None` for a plain body. Raises `UnsupportedMediaType` for anything else."""
    name = (header or "identity").lower()
    if name == "identity":
        return None
    if name not in _ENCODINGS:
        raise UnsupportedMediaType(f"Content-Encoding {name[:60]!r} is not taken; send gzip, deflate or neither")
    return _ENCODINGS[name]


def encoding_of_reply(accepted: str | None) -> Encoding | None:
    """The encoding that `Accept-Encoding` asks for: the only one it names, unless with the weight 0."""
    if accepted is None:
        return None
    name, _, weight = accepted.lower().partition(";")
    if weight.strip().removeprefix("q=").strip("0.") == "" and weight:
        return None
    return _ENCODINGS.get(name.strip())


def permits_gzip(accepted: str) -> bool:
    """Whether an `Accept-Encoding` header permits gzip, by its name or as anything, with a weight above 0."""
    weights = {}
    for item in accepted.lower()[:_LONGEST].split(","):
        name, _, weight = item.partition(";")
        weights[name.strip()] = weight.replace(" ", "").removeprefix("q=").strip("0.") != "" or not weight.strip()
    return weights.get("gzip", weights.get("*", False))


def inflate(body: bytes, encoding: Encoding, limit: int) -> bytes:
    """The body as it was before it was compressed.

    Raises:
        BodyTooLarge: it would be more than `limit` bytes; no more than these have been inflated.
        BadInput: it is damaged, cut short, or followed by something else.
    """
    stream = zlib.decompressobj(_window(body, encoding))
    try:
        inflated = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise BadInput(f"the body is not valid {encoding}: {error}") from None
    if len(inflated) > limit:
        raise BodyTooLarge(f"the body inflates to more than {limit} bytes (limits.body_bytes)")
    if not stream.eof:
        raise BadInput(f"the {encoding} body ends before its end mark")
    if stream.unused_data:
        # Further gzip members would be legal; thousands of empty ones cost seconds, and no HTTP client sends any.
        raise BadInput(f"{len(stream.unused_data)} bytes follow the end of the {encoding} body")
    return inflated


def _window(body: bytes, encoding: Encoding) -> int:
    """What zlib is to expect. `deflate` is the zlib format, but some clients send the bare stream."""
    if encoding == "gzip":
        return _GZIP
    wrapped = len(body) >= 2 and body[0] & 0x0F == zlib.DEFLATED and (body[0] << 8 | body[1]) % 31 == 0
    return zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS


def compress(body: bytes, encoding: Encoding) -> bytes:
    """The body compressed quickly rather than well."""
    return gzip.compress(body, _FAST, mtime=0) if encoding == "gzip" else zlib.compress(body, _FAST)
