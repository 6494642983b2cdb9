"""A large body is read from the socket straight into the place where its tensors are used.

A protocol of pieces would get it copied twice before: from the loop's buffer into a piece, and from all pieces into one
body. So while the rest of such a body is to come, this takes the place of its connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

LARGE = 2**16
"""Bytes still to come for which it is worth changing places, which costs about as much as two small copies."""


class BodyReader(asyncio.BufferedProtocol):
    """Reads exactly the rest of one body, gives the connection its place back, and then the body to `came`.

    Whatever else happens on the transport meanwhile is the connection's.
    """

    def __init__(
        self,
        connection: asyncio.Protocol,
        transport: asyncio.Transport,
        begun: bytes,
        length: int,
        came: Callable[[memoryview], None],
    ) -> None:
        """`begun` is the part of the body that came with its head, `length` the bytes of all of it."""
        self._connection = connection
        self._transport = transport
        self._came = came
        # Pages that no byte has come for are no memory yet: a client that only announces a body takes none.
        self._body = np.empty(length, np.uint8).data
        self._body[: len(begun)] = begun
        self._rest = self._body[len(begun) :]
        _change(transport, self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's guess
        """Where the next bytes go."""
        return self._rest

    def buffer_updated(self, nbytes: int) -> None:
        """So many have come."""
        self._rest = self._rest[nbytes:]
        if not self._rest:
            _change(self._transport, self._connection)
            self._came(self._body)

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


def _change(transport: asyncio.Transport, protocol: asyncio.BaseProtocol) -> None:
    # A transport looks at the kind of its protocol only where it begins to read.
    transport.pause_reading()
    transport.set_protocol(protocol)
    transport.resume_reading()
