"""How a connection over HTTP ends: its client is refused, sends no more, leaves, or is told to go.

The part of a connection that knows which requests it owes a reply, and what it waits for. How requests come and are
answered is in `connection.py`.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from leanserve.http.body_reader import BodyReader
from leanserve.http.exchange import Exchange
from leanserve.http.leaving import BEGINNING, CLOSED, HALF_CLOSED, BegunReply, has_unread, tcp_state
from leanserve.http.messages import Response
from leanserve.http.open_connections import ConnectionState, CountedConnection, OpenConnections
from leanserve.http.refusals import Refused
from leanserve.request_identity import RequestIdentities, RequestIdentity

_FIRST_LOOK_S, _LAST_LOOK_S = 0.001, 0.25
"""After which time it is first asked, and how often in the end, whether a client has left."""


class EndingConnection(HttpToolsProtocol):
    """uvicorn's connection of one client, which ends in good order."""

    everyone: OpenConnections
    identities: RequestIdentities
    """Of what is no valid request, and reaches nobody else."""
    handshake: CountedConnection | None = None
    """Under TLS, what counted until now."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.all = self.everyone
        self.headers: list[tuple[bytes, bytes]] = []  # there is none yet where the first line is wrong
        self.held = 0
        """Bytes of an unfinished request, or of a large one until it is answered."""
        self._answered_at = 0.0
        self._place: Literal["between", "head", "body"] = "between"
        """Where in a request the parser is."""
        self._since = 0.0
        """When it was first seen at that place without having got through; 0: it was not."""
        self._rest: bytes | memoryview = b""
        """What came, and waits to be parsed."""
        self._arriving: Exchange | None = None
        """The exchange on the short way whose request is still arriving."""
        self._running: Any = None
        """What is answered now, or was last: an exchange, or uvicorn's cycle."""
        self._reader: BodyReader | None = None
        self._refusal: bytes | None = None
        """The reply that ends this connection, once what came before it is answered."""
        self._begun = False
        """Whether the beginning of the next reply on the short way was sent already."""
        self._ended = False
        """Whether the client sends no more."""
        self._watched = False
        self._hung_up = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._answered_at = self.loop.time()
        if self.handshake is not None:
            self.all.forget(self.handshake)
            self.handshake = None
        self.all.admit(self)

    @property
    def peer(self) -> str:
        """The client's address, for the log."""
        return ":".join(map(str, self.client)) if self.client else "a client"

    def refuse(self, refused: Refused) -> None:
        """Send this in its turn, behind the replies to what came before, and end. What still comes is thrown away."""
        if self._refusal is not None:
            return
        met = f" (limits.{refused.bound})" if refused.bound else ""
        self.all.log.tell(refused.kind, f"refused {self.peer} with {refused.status}{met}: {str(refused)[:200]}")
        cycle = self.cycle if self._is_arriving() else None
        answered = cycle is not None and (cycle.response_complete or getattr(cycle, "response_started", False))
        response = refused.response()
        identity = self.identities.of(dict(self.headers))
        self._refusal = b"" if answered else self._head(response, identity, keep_alive=False) + response.body
        self._rest = b""
        self._drop_arrival()
        if not self._owes():
            self._end_refused()

    def _end_refused(self) -> None:
        self.transport.write(self._refusal or b"")
        self._hang_up()

    def _hang_up(self) -> None:
        """Send no more, and throw away what still comes: a connection closed at once would be reset, and the reply
        lost with it."""
        self._hung_up = True
        self._answered_at = self.loop.time()
        self._refusal = self._refusal or b""
        if self.transport.can_write_eof():
            self.transport.write_eof()
            self.transport.resume_reading()
        else:
            self.transport.close()

    def _head(self, response: Response, identity: RequestIdentity, *, keep_alive: bool) -> bytes:
        headers = (*self.server_state.default_headers, *response.headers, *identity)
        lines = b"".join([b"%b: %b\r\n" % header for header in headers])
        if not keep_alive:
            lines += b"connection: close\r\n"
        return b"%b%bcontent-length: %d\r\n\r\n" % (STATUS_LINE[response.status], lines, len(response.body))

    def _is_arriving(self) -> bool:
        """Whether the newest request has its head, but not its body."""
        return self._place == "body" or bool(getattr(self.cycle, "missing", 0))

    def _owes(self) -> bool:
        """Whether a request that came as a whole waits for its reply."""
        running = self._running
        return bool(self.pipeline) or not (running is None or running.response_complete or running.disconnected)

    def _drop_arrival(self) -> None:
        """The request that is arriving will never be here as a whole."""
        if self._is_arriving():
            if self.pipeline and self.pipeline[0][0] is self.cycle:
                self.pipeline.popleft()
            _mark_gone(self.cycle)
        self._place = "between"
        self._arriving = None
        if self._reader is not None:
            self._reader.stop()
        self.all.hold(self, 0)

    def abort(self) -> None:
        """End at once."""
        self.transport.abort()

    def close_if_idle(self) -> None:
        """End, unless a request has come that the loop has not read yet."""
        if not has_unread(self.transport):
            self.transport.close()

    def announce_end(self) -> None:
        """Have the reply that is next say that it is the last one, unless requests wait behind it."""
        running = self._running
        if running is not None and not self.pipeline and not self._rest:
            running.keep_alive = False

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more; what came as a whole before is answered all the same."""
        self._ended = True
        if self._hung_up or not self.transport.can_write_eof():  # TLS ends both ways at once
            return False
        if not self._rest:
            self._drop_arrival()
        if self._owes() or self._rest:
            self._watch()
            return True
        return False

    def _watch(self) -> None:
        """Look from time to time whether the client has left, as long as it waits for a reply."""
        if not self._watched:
            self._watched = True
            self._look(_FIRST_LOOK_S)

    def _look(self, delay: float) -> None:
        if self.transport.is_closing() or not (self._owes() or self._rest):
            self._watched = False
            return
        state = tcp_state(self.transport)
        if state == CLOSED:
            self.transport.abort()
            return
        if state == HALF_CLOSED and self._begin_reply():
            delay = _FIRST_LOOK_S
        self.loop.call_later(delay, self._look, min(2 * delay, _LAST_LOOK_S))

    def _begin_reply(self) -> bool:
        """Send what every reply begins with, unless it was: a client that has left resets the connection."""
        running = self._running
        if isinstance(running, Exchange):
            if self._begun or running.response_complete:
                return False
            self._begun = True
        elif running.response_started or running.transport is not self.transport:
            return False
        else:
            running.transport = BegunReply(self.transport)
        self.transport.write(BEGINNING)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        waiting = [self._running, self.cycle, *(cycle for cycle, _ in self.pipeline)]
        super().connection_lost(exc)
        self._reader = None  # nothing else would end that circle, and the body in it, soon
        self._rest = b""
        for cycle in waiting:
            _mark_gone(cycle)
        self.pipeline.clear()
        self.all.forget(self)

    @property
    def unread(self) -> int:
        """Bytes of replies that the client has not read yet."""
        return self.transport.get_write_buffer_size()

    def pause_writing(self) -> None:
        self._answered_at = self.loop.time()
        super().pause_writing()
        self.all.count_unread(self.unread)

    def waits(self) -> tuple[ConnectionState, float]:
        """What this connection waits for, and since when."""
        ending = self.transport.is_closing() or self._hung_up
        if self.flow.write_paused or (ending and self.transport.get_write_buffer_size()):
            return "reading", self._answered_at
        if ending:
            return "closing", self._answered_at
        if not (self._rest or self.pipeline) and self._is_arriving():
            return "body", self._since
        if self._owes() or self._rest:
            return "answering", self._since
        if self._place == "head":
            return "head", self._since
        return "silent" if self.cycle is None else "idle", self._answered_at


def _mark_gone(cycle: Any) -> None:
    """Tell what answers a request that nobody waits for its reply any more."""
    if isinstance(cycle, Exchange):
        cycle.lost()
    elif cycle is not None:
        cycle.disconnected = not cycle.response_complete
        cycle.message_event.set()
