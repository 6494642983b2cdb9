"""A large body is read from the socket straight into the place where its tensors are used.

A protocol of pieces would get it copied twice before: from the loop's buffer into a piece, and from all pieces into one
body. So a connection that has such a body gives up its place on the transport to a reader, for good: a client that sent
one will send more, and to change places takes four system calls.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from leanserve.http.open_connections import OpenConnections
from leanserve.http.reading_turns import LEAST

LARGE = 2**16
"""Bytes still to come for which it is worth changing places, which costs about as much as two small copies."""
PIECE = 2**14
"""Bytes read at once where a head may begin. What follows it in the same piece is copied, as small bodies are."""
_NOTHING = memoryview(b"")
_WASTE = 2**22
"""Bytes thrown away at once."""
_ROOM = 2**24
"""The most that the kernel is asked to take in before it is read."""
_UNREAD = socket.MSG_DONTWAIT | socket.MSG_TRUNC
"""What has come by now, thrown away uncopied (Linux, tcp(7))."""
_FIRST_WASTE = 2**12
"""Bytes read by the loop where unwanted ones are still to come: it only has to tell of them."""


class ReaderOwner(Protocol):
    """The connection that a reader stands for: an `asyncio.Protocol` that is also told of what arrives in place."""

    @property
    def all(self) -> OpenConnections:
        """Among which it is."""

    def arrived(self, nbytes: int) -> None:
        """So many bytes more of the body."""

    def data_received(self, data: bytes) -> None:
        """What is not of a body."""

    def eof_received(self) -> bool:
        """The client sends no more."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left."""

    def pause_writing(self) -> Any:
        """The client does not read."""

    def resume_writing(self) -> Any:
        """It does again."""


class BodyReader(asyncio.BufferedProtocol):
    """Reads bodies in place for a connection, or past them, and whatever stands between them in pieces.

    All else that happens on the transport is the connection's.
    """

    def __init__(self, connection: ReaderOwner, transport: asyncio.Transport, length: int) -> None:
        """Takes the place of `connection` on `transport`, where bodies of about this length are to be expected."""
        self._connection = connection
        self._turns = connection.all.reading
        self._waits = False
        self._piece = memoryview(bytearray(PIECE))
        self._body = self._rest = self._scrap = _NOTHING
        self._unwanted = 0
        self._came: Callable[[memoryview], None]
        self._transport = transport
        transport.pause_reading()  # a transport looks at the kind of its protocol only where it begins to read
        transport.set_protocol(self)
        transport.resume_reading()
        _make_room(transport, length)

    def read(self, begun: bytes, length: int, came: Callable[[memoryview], None]) -> None:
        """Read a body of `length` bytes, which `begun` came with its head; then give the whole to `came`."""
        # Pages that no byte has come for are no memory yet: a client that only announces a body takes none.
        self._body = np.empty(length, np.uint8).data
        self._body[: len(begun)] = begun
        self._rest = self._body[len(begun) :]
        self._came = came

    def skip(self, length: int, came: Callable[[memoryview], None]) -> None:
        """Read past so many bytes, then give nothing to `came`."""
        self._scrap = self._scrap or np.empty(_WASTE, np.uint8).data  # memory only as far as something is put there
        self._unwanted = length
        self._came = came
        self._discard()

    def stop(self) -> None:
        """Forget the body; what still comes of it is given to the connection, as what follows it would be."""
        self._body = self._rest = _NOTHING
        self._unwanted = 0
        if self._waits:
            self._turns.forget(self)
            self.go_on()

    def go_on(self) -> None:
        """Read what has come meanwhile."""
        self._waits = False
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's guess
        """Where the next bytes go."""
        if self._unwanted:
            return self._scrap[: min(self._unwanted, _FIRST_WASTE)]
        return self._rest[: max(self._turns.left, LEAST)] or self._piece

    def buffer_updated(self, nbytes: int) -> None:
        """So many have come."""
        if self._unwanted:
            self._unwanted -= nbytes
            self._discard()
        elif self._rest:
            self._rest = self._rest[nbytes:]
            has_turn = self._turns.took(nbytes)
            if self._rest:
                if not has_turn:
                    self._wait()
                self._connection.arrived(nbytes)
            else:
                body, self._body, self._rest = self._body, _NOTHING, _NOTHING  # an empty rest would hold all of it, too
                self._came(body)
        else:
            self._connection.data_received(bytes(self._piece[:nbytes]))

    def _wait(self) -> None:
        self._waits = True
        self._transport.pause_reading()
        self._turns.wait(self)

    def _discard(self) -> None:
        """Throw away what has come of the unwanted bytes, without the loop, which would ask for every piece of it."""
        known = self._transport.get_extra_info("socket")
        connection = socket.socket(known.family, known.type, known.proto, fileno=known.fileno())
        try:
            thrown = 1
            while self._unwanted and thrown:
                thrown = connection.recv_into(self._scrap, min(self._unwanted, _WASTE), _UNREAD)
                self._unwanted -= thrown
        except OSError:  # no more for now, or no more at all: of that the loop will tell
            pass
        finally:
            connection.detach()  # it is the transport's
        if not self._unwanted:
            self._came(_NOTHING)

    def eof_received(self) -> bool | None:
        """The client sends no more."""
        return self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left."""
        self.stop()
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read what was written to it."""
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        """It does again."""
        self._connection.resume_writing()


def _make_room(transport: asyncio.Transport, length: int) -> None:
    """Have the kernel take in a body of this length before it is read.

    Its buffer would grow with the age of the connection, and whenever it is full the client has to wait for us and be
    woken. To want that much at once makes room for it, up to the system's limit (Linux, socket(7)); the buffer may grow
    on afterwards, unlike one whose size is set. Twice: its own records count, too.
    """
    connection = transport.get_extra_info("socket")
    for least in (min(2 * length, _ROOM), 1):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
