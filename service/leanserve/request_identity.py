"""Which request something belongs to: the id that a client, a proxy or a tracer gave it, in replies and log lines.

`x-request-id` is taken as it is, where it is short and printable; else the trace id of a W3C `traceparent`; else an id
is made: four random bytes that are this process's, and a number, which costs a fraction of a `uuid4`. Sources: W3C
Trace Context (level 1, 3.2); the header `x-request-id` as Envoy, nginx and OpenAI's API use it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from contextvars import ContextVar
from itertools import count
from typing import TypeAlias

REQUEST_ID, TRACEPARENT = b"x-request-id", b"traceparent"
_TAKEN = re.compile(rb"[!-~]{1,128}")
_TRACE = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-[!-~]{1,128})?")


RequestIdentity: TypeAlias = tuple[tuple[bytes, bytes], ...]
"""The headers of a reply that tell which request it answers: first its id; then a `traceparent`, as it came. It is made
for every request, and nothing that is made so often is cheaper than this."""
CURRENT_REQUEST: ContextVar[RequestIdentity | None] = ContextVar("current_request", default=None)
"""Of the task that answers a request; `None` elsewhere."""


def request_id(identity: RequestIdentity) -> str:
    """The id alone, as text."""
    return identity[0][1].decode()


class RequestIdentities:
    """Finds the identity of each request, or makes one."""

    def __init__(self) -> None:
        self._made = os.urandom(4).hex().encode() + b"-%x"
        self._numbers = count(1)

    def of(self, headers: Mapping[bytes, bytes]) -> RequestIdentity:
        """The identity of the request with these headers (names in lower case)."""
        given, trace = headers.get(REQUEST_ID), headers.get(TRACEPARENT)
        if given is not None and not _TAKEN.fullmatch(given):
            given = None
        if trace is not None and (found := _TRACE.fullmatch(trace)):
            return (REQUEST_ID, given or found[1]), (TRACEPARENT, trace)
        return ((REQUEST_ID, given or self._made % next(self._numbers)),)


class RequestInLog(logging.Filter):
    """Gives every log record a field `request`, for the format: the id of the request that it is about, or nothing.

    A record that is logged elsewhere than in the task of its request says so: `extra={"identity": ...}`.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        identity: RequestIdentity | None = getattr(record, "identity", None) or CURRENT_REQUEST.get()
        record.request = f" [request {request_id(identity)}]" if identity else ""
        return True
