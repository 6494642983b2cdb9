"""Listening: the port is claimed before hours of building, there are descriptors for all connections, and the end loses
none that is waiting to be accepted."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import resource
import socket
import struct
from typing import Final

from leanserve.http.open_connections import MOST_OPEN

logger = logging.getLogger(__name__)

_ATTACH_FILTER: Final = 26
"""`SO_ATTACH_FILTER` (Linux)."""
_NO_SYN: Final = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
"""A filter (classic BPF): load the flags of TCP; if SYN is among them, let nothing through, else everything."""
_LOOKS, _LOOK_S = 5, 0.02
"""So often in a row nothing waits to be accepted before the last handshakes are taken to be over."""
_OTHER_FILES: Final = 256
"""Descriptors for everything but connections: models, threads' pipes, gRPC."""


def listen(host: str, port: int) -> socket.socket:
    """Claim the port before hours of building, rather than fail after them.

    Raises:
        OSError: the address is in use or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    claimed = socket.socket(family, socket.SOCK_STREAM)
    claimed.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Inherited by connections; without it a reply in two writes waits for the client's delayed acknowledgement.
    claimed.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        claimed.bind((host, port))
    except OSError:
        claimed.close()
        raise
    return claimed


async def refuse_connections(listening: socket.socket, timeout_s: float) -> None:
    """Have the system begin no more connections, and wait until those that it has were accepted, at most so long.

    A listening socket that is closed resets what waits to be accepted, though to its client that is a connection. So a
    filter is put before it first that drops requests for new ones (Linux, socket(7)).
    """
    nothing_new = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in _NO_SYN))
    program = struct.pack("HL", len(_NO_SYN), ctypes.addressof(nothing_new))
    try:
        listening.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)
    except OSError:
        return
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout_s
    looks = 0
    while looks < _LOOKS and loop.time() < end:
        await asyncio.sleep(_LOOK_S)
        looks = looks + 1 if _waiting(listening) == 0 else 0


def _waiting(listening: socket.socket) -> int:
    """Connections that wait to be accepted (Linux, `tcpi_unacked` of a socket that listens)."""
    return int(struct.unpack_from("I", listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28), 24)[0])


def allow_descriptors(connections: int) -> int:
    """Have the system allow so many connections, refused ones included; the result is how many it allows, at most.

    The soft limit of a process is often 1,024, for the sake of programs that are older than `poll`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = round(connections * MOST_OPEN) + _OTHER_FILES
    if wanted > soft != resource.RLIM_INFINITY:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if wanted <= soft or soft == resource.RLIM_INFINITY:
        return connections
    allowed = max(1, round((soft - _OTHER_FILES) / MOST_OPEN))
    logger.warning("the system allows %d open files: limits.connections is %d, not %d", soft, allowed, connections)
    return allowed
