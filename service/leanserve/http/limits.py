"""What a client may send over HTTP: in bytes, in number and in time."""

from __future__ import annotations

from typing import NamedTuple


class HttpLimits(NamedTuple):
    """The bounds of one server; they have the names and the meaning that they have in the config."""

    body_bytes: int
    url_bytes: int
    header_bytes: int
    headers: int
    head_s: float
    body_s: float
    keep_alive_s: float
    connections: int
    buffered_bytes: int
    unread_bytes: int
