"""Whether a client that sends no more has left, or only sends no more: half-closed, and waiting for its reply.

Both look the same to the one who reads: an end of the stream. They differ in what happens to bytes that are sent: a
client that has left resets the connection. So the first bytes of the reply are sent early; they are the same for every
reply. Then the kernel knows, and is asked (Linux, tcp(7)). It is asked, too, while reading is paused, where the end of
the stream would not be noticed at all.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import termios
from typing import Any

BEGINNING = b"HTTP/1.1 "
"""With this every reply begins."""
CLOSED, HALF_CLOSED = 7, 8
"""States of a connection (Linux, `TCP_CLOSE` and `TCP_CLOSE_WAIT`): reset by the client; ended by it, not by us."""
_UNKNOWN = 0


def tcp_state(transport: asyncio.BaseTransport) -> int:
    """The state of a connection; 0 where the system does not tell."""
    connection = transport.get_extra_info("socket")
    if connection is None or not hasattr(socket, "TCP_INFO"):
        return _UNKNOWN
    try:
        return int(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0])
    except OSError:  # it is no TCP connection
        return _UNKNOWN


def has_unread(transport: asyncio.BaseTransport) -> bool:
    """Whether something has come that the loop has not read yet: a request, on a connection that seems idle."""
    connection = transport.get_extra_info("socket")
    if connection is None:
        return False
    unread = fcntl.ioctl(connection.fileno(), termios.FIONREAD, bytes(4))
    return any(unread)


class BegunReply:
    """A transport on which a reply has begun: of the first bytes written to it, those that were sent are left out."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._sent = len(BEGINNING)

    def write(self, data: bytes) -> None:
        """Send the rest."""
        self._transport.write(data[self._sent :])
        self._sent = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
