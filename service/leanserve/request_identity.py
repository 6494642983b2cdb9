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
from typing import NamedTuple

REQUEST_ID, TRACEPARENT = b"x-request-id", b"traceparent"
_TAKEN = re.compile(rb"[!-~]{1,128}")
_TRACE = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-[!-~]{1,128})?")


class RequestIdentity(NamedTuple):
    """The id of a request, and the headers of its reply that tell it; a `traceparent` goes back as it came."""

    id: str
    headers: tuple[tuple[bytes, bytes], ...]


CURRENT_REQUEST: ContextVar[RequestIdentity | None] = ContextVar("current_request", default=None)
"""Of the task that answers a request; `None` elsewhere."""


class RequestIdentities:
    """Finds the identity of each request, or makes one."""

    def __init__(self) -> None:
        self._prefix = os.urandom(4).hex().encode()
        self._numbers = count(1)

    def enter(self, headers: Mapping[bytes, bytes]) -> RequestIdentity:
        """The identity of the request with these headers (names in lower case), which the running task answers now."""
        given, trace = headers.get(REQUEST_ID), headers.get(TRACEPARENT)
        identity = self._made() if given is None and trace is None else self._given(given, trace)
        CURRENT_REQUEST.set(identity)
        return identity

    def _made(self) -> RequestIdentity:
        made = b"%b-%x" % (self._prefix, next(self._numbers))
        return RequestIdentity(made.decode(), ((REQUEST_ID, made),))

    def _given(self, given: bytes | None, trace: bytes | None) -> RequestIdentity:
        found = _TRACE.fullmatch(trace) if trace else None
        if given is None or not _TAKEN.fullmatch(given):
            given = found[1] if found else None
        name = self._made().headers[0] if given is None else (REQUEST_ID, given)
        return RequestIdentity(name[1].decode(), (name, (TRACEPARENT, trace)) if found and trace else (name,))


class RequestInLog(logging.Filter):
    """Gives every log record a field `request`, for the format: the id of the request that it is about, or nothing.

    A record that is logged elsewhere than in the task of its request says so: `extra={"identity": ...}`.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        identity: RequestIdentity | None = getattr(record, "identity", None) or CURRENT_REQUEST.get()
        record.request = f" [request {identity.id}]" if identity else ""
        return True
