"""All connections of a server together: how many there are, what they hold, how long they may take, and how they end.

Nothing here runs for a request that comes as a whole. Once a second every connection is looked at: one that takes
longer than it may is ended. If there are too many of them, those that have been idle for longest make room, so that
silent ones lock nobody out; if they hold too much, the one that has held most for longest is refused.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import math
from collections import deque
from typing import Final, Literal, Protocol

from leanserve.http.limits import HttpLimits
from leanserve.http.rate_limited_log import RateLimitedLog
from leanserve.http.reading_turns import ReadingTurns
from leanserve.http.refusals import Refused, too_slow

logger = logging.getLogger(__name__)

ConnectionState = Literal["handshake", "silent", "idle", "head", "body", "answering", "reading", "closing"]
"""What a connection waits for: the end of TLS's handshake, a first request, a next one, the rest of a head or a body;
its reply, or that the client reads that; its end."""
LINGER_S: Final = 2.0
"""How long a client that was refused may go on sending; a connection closed at once would reset, and lose the reply."""
PARSED_AT_ONCE: Final = 2**16
"""Bytes of large heads, or of what stands where one may be, that are parsed in a turn of the loop: 2 ms at worst."""
_SWEEP_S: Final = 1.0
_AT_ONCE: Final = 64
"""Connections that are found in one look for those that may make room."""
_RANK: Final[dict[ConnectionState, int]] = {
    "handshake": 1,
    "silent": 1,
    "head": 1,
    "idle": 2,
    "body": 3,
    "reading": 3,
}
"""In which order they do; who is being answered does not."""
MOST_OPEN: Final = 1.25
"""As many connections as may be open at all, refused ones included, as a multiple of those that are answered."""
MOMENT_S: Final = 0.5
"""Who sent nothing for so long is not about to, as far as can be known at the end of the server."""
_ARRIVAL_S: Final = 5.0
"""How long a request that is not here as a whole may still arrive at the end of the server."""
_LOOK_S: Final = 0.02


class CountedConnection(Protocol):
    """One connection, as far as all of them together are concerned."""

    loop: asyncio.AbstractEventLoop
    held: int
    """Bytes of an unfinished request, or of a large one until it is answered."""

    @property
    def peer(self) -> str:
        """The client's address, for the log."""

    @property
    def unread(self) -> int:
        """Bytes of replies that its client has not read yet."""

    def waits(self) -> tuple[ConnectionState, float]:
        """What it waits for, and since when."""

    def refuse(self, refused: Refused) -> None:
        """Tell its client this, in its turn, and end."""

    def abort(self) -> None:
        """End it at once."""

    def close_if_idle(self) -> None:
        """End it, unless something has come that was not read yet."""

    def announce_end(self) -> None:
        """Have the reply that is next be the last one."""


class OpenConnections:
    """The connections of one server, which tell it when they come, hold something, and go."""

    def __init__(self, limits: HttpLimits) -> None:
        self.limits = limits
        self.draining = False
        """Whether every reply is the last one of its connection."""
        self.held_bytes = 0
        """Of all requests that are not here as a whole, and of large ones until they are answered."""
        self._written = 0
        """Bytes of replies for clients that do not read at once, since it was last looked how many are unread."""
        self.reading = ReadingTurns()
        self.parsing = ReadingTurns(PARSED_AT_ONCE)
        self.log = RateLimitedLog(logger)
        self._open: set[CountedConnection] = set()
        self._may_go: deque[tuple[CountedConnection, float]] = deque()
        self.keep(limits)
        self._timer: asyncio.TimerHandle | None = None

    def keep(self, limits: HttpLimits) -> None:
        """Keep these limits from now on; connections that are there keep the sizes that they began with."""
        self.limits = limits
        self._seconds: dict[ConnectionState, float] = {
            "handshake": limits.head_s,
            "silent": limits.keep_alive_s,
            "idle": limits.keep_alive_s,
            "head": limits.head_s,
            "body": limits.body_s,
            "reading": limits.body_s,
            "closing": LINGER_S,
            "answering": math.inf,
        }
        self._period = min(_SWEEP_S, min(self._seconds.values()) / 4)

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, connection: CountedConnection) -> None:
        """One more. Where that is one too many another makes room; else it is refused."""
        if len(self._open) >= self.limits.connections and not self._make_room():
            if len(self._open) >= self.limits.connections * MOST_OPEN:
                connection.abort()
                return
            text = f"more than {self.limits.connections} connections are being answered; try again later"
            connection.refuse(Refused(503, "not_ready", text, "connections"))
        self._open.add(connection)
        if self._timer is None:
            self._timer = connection.loop.call_later(self._period, self._sweep, connection.loop)

    def forget(self, connection: CountedConnection) -> None:
        """One less."""
        self._open.discard(connection)
        self.hold(connection, 0)

    def hold(self, connection: CountedConnection, nbytes: int) -> None:
        """So many bytes of a request are held for this connection."""
        self.held_bytes += nbytes - connection.held
        connection.held = nbytes
        if self.held_bytes > self.limits.buffered_bytes:
            self._shed(connection)

    def count_unread(self, nbytes: int) -> None:
        """A transport keeps so many bytes of a reply for a client that does not read them at once.

        All connections are looked at after each quarter of the bound, by which it may be exceeded.
        """
        self._written += nbytes
        if self._written > self.limits.unread_bytes / 4:
            self._written = 0
            self._shed_unread()

    def drain(self) -> None:
        """From now on every reply is the last one of its connection."""
        self.draining = True
        for connection in self._open:
            connection.announce_end()

    async def drained(self, timeout_s: float) -> None:
        """Wait until all connections have ended, at most so long; those that wait for their clients only are ended."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        moment, arrival = min(MOMENT_S, timeout_s / 2), min(_ARRIVAL_S, timeout_s / 2)
        while self._open and loop.time() < began + timeout_s:
            now = loop.time()
            for connection in list(self._open):
                state, since = connection.waits()
                if state in {"silent", "idle"} and now - since >= moment:
                    connection.close_if_idle()
                elif state in {"handshake", "head", "body"} and now - began >= arrival:
                    connection.refuse(Refused(503, "not_ready", "draining: the request did not arrive in time"))
            await asyncio.sleep(_LOOK_S)
        for connection in list(self._open):
            connection.abort()

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(self._period, self._sweep, loop) if self._open else None
        now = loop.time()
        for connection in list(self._open):
            state, since = connection.waits()
            if now - since > self._seconds[state]:
                self._end(connection, state)

    def _end(self, connection: CountedConnection, state: ConnectionState) -> None:
        """It took longer than it may."""
        if state == "handshake":
            connection.refuse(too_slow("handshake", "head_s", self.limits.head_s))
        elif state == "head":
            connection.refuse(too_slow("head", "head_s", self.limits.head_s))
        elif state == "body":
            connection.refuse(too_slow("body", "body_s", self.limits.body_s))
        elif state == "reading":
            self.log.tell("reading", f"{connection.peer} did not read its reply within limits.body_s: closed")
            connection.abort()
        elif state == "closing":
            connection.abort()
        else:
            connection.close_if_idle()

    def _make_room(self) -> bool:
        """End the connection that has waited for its client for longest, if there is one."""
        if not self._may_go:
            self._may_go.extend(self._longest())
        while self._may_go:
            connection, since = self._may_go.popleft()
            state, now_since = connection.waits()
            if connection in self._open and state in _RANK and since == now_since:
                self.log.tell("connections", f"limits.connections was met: {connection.peer}, {state}, made room")
                self._open.discard(connection)
                connection.abort()
                return True
        return False

    def _longest(self) -> list[tuple[CountedConnection, float]]:
        waiting = [(_RANK[state], since, connection) for connection, state, since in self._waits() if state in _RANK]
        found = heapq.nsmallest(_AT_ONCE, waiting, key=lambda item: item[:2])
        return [(connection, since) for _, since, connection in found]

    def _waits(self) -> list[tuple[CountedConnection, ConnectionState, float]]:
        return [(connection, *connection.waits()) for connection in self._open]

    def _shed(self, last: CountedConnection) -> None:
        """Refuse the unfinished requests that hold most for longest until what is held is within the bound."""
        now = last.loop.time()
        while self.held_bytes > self.limits.buffered_bytes:
            arriving = [(item.held * (now - since), item) for item, state, since in self._waits() if _arrives(state)]
            worst = max(arriving, key=lambda pair: pair[0])[1] if arriving else last
            if not worst.held:
                return
            text = f"all unfinished requests have more than {self.limits.buffered_bytes} bytes; try again later"
            worst.refuse(Refused(503, "not_ready", text, "buffered_bytes"))
            self.hold(worst, 0)

    def _shed_unread(self) -> None:
        """Leave clients that have left most unread for longest until all is within the bound; the last one may read."""
        now = asyncio.get_running_loop().time()
        reading = [(each.unread, now - since, each) for each, state, since in self._waits() if state == "reading"]
        unread = sum(nbytes for nbytes, _, _ in reading)
        for nbytes, waited_s, connection in sorted(reading, key=lambda one: one[0] * one[1], reverse=True)[:-1]:
            if unread <= self.limits.unread_bytes:
                return
            told = f"{connection.peer} has left {nbytes} bytes of its reply unread for {waited_s:.1f} s: closed"
            self.log.tell("unread", f"limits.unread_bytes was met: {told}")
            connection.abort()
            unread -= nbytes


def _arrives(state: ConnectionState) -> bool:
    return state in {"head", "body"}
