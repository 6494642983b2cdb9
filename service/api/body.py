"""A large body is read from the socket straight into the place where its tensors are used.

A protocol of pieces would get it copied twice before: from the loop's buffer into a piece, and from all pieces into one
body. So a connection that has such a body gives up its place on the transport to a reader, for good: a client that sent
one will send more, and to change places takes four system calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

LARGE = 2**16
"""Bytes still to come for which it is worth changing places, which costs about as much as two small copies."""
PIECE = 2**14
"""Bytes read at once where a head may begin. What follows it in the same piece is copied, as small bodies are."""
_NOTHING = memoryview(b"")
_WASTE = memoryview(bytearray(LARGE))
"""Where all readers put what nobody wants: small enough to stay in the core's cache."""


class BodyReader(asyncio.BufferedProtocol):
    """Reads bodies in place for a connection, or past them, and whatever stands between them in pieces.

    All else that happens on the transport is the connection's.
    """

    def __init__(self, connection: asyncio.Protocol, transport: asyncio.Transport) -> None:
        """Takes the place of `connection` on `transport`."""
        self._connection = connection
        self._piece = memoryview(bytearray(PIECE))
        self._body = self._rest = _NOTHING
        self._unwanted = 0
        self._came: Callable[[memoryview], None]
        transport.pause_reading()  # a transport looks at the kind of its protocol only where it begins to read
        transport.set_protocol(self)
        transport.resume_reading()

    def read(self, begun: bytes, length: int, came: Callable[[memoryview], None]) -> None:
        """Read a body of `length` bytes, which `begun` came with its head; then give the whole to `came`."""
        # Pages that no byte has come for are no memory yet: a client that only announces a body takes none.
        self._body = np.empty(length, np.uint8).data
        self._body[: len(begun)] = begun
        self._rest = self._body[len(begun) :]
        self._came = came

    def skip(self, length: int, came: Callable[[memoryview], None]) -> None:
        """Read past so many bytes, then give nothing to `came`."""
        self._unwanted = length
        self._came = came

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's guess
        """Where the next bytes go."""
        return _WASTE[: self._unwanted] if self._unwanted else self._rest or self._piece

    def buffer_updated(self, nbytes: int) -> None:
        """So many have come."""
        if self._rest:
            self._rest = self._rest[nbytes:]
        elif self._unwanted:
            self._unwanted -= nbytes
        else:
            self._connection.data_received(bytes(self._piece[:nbytes]))
            return
        if not self._rest and not self._unwanted:
            body, self._body, self._rest = self._body, _NOTHING, _NOTHING  # an empty rest would hold all of it, too
            self._came(body)

    def eof_received(self) -> bool | None:
        """The client sends no more."""
        return self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left."""
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read what was written to it."""
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        """It does again."""
        self._connection.resume_writing()
