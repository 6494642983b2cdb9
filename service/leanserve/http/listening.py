"""Listening: the port is claimed before hours of building, there are descriptors for all connections, and the end loses
none that is waiting to be accepted."""

from __future__ import annotations

import ctypes
import logging
import resource
import socket
import struct
from typing import Final

from leanserve.http.open_connections import MOST_OPEN

logger = logging.getLogger(__name__)

_ATTACH_FILTER, _RETURN = 26, 0x06
"""`SO_ATTACH_FILTER`, and the instruction that ends a filter with how much it lets through (Linux)."""
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


def refuse_connections(listening: socket.socket) -> bool:
    """Have the system answer no request for a connection any more; those that it has taken can still be accepted.

    A listening socket that is closed resets what waits to be accepted, though to its client that is a connection. So a
    filter that lets nothing through is put before it first (Linux, socket(7)). The result is whether that is possible.
    """
    nothing = ctypes.create_string_buffer(struct.pack("HBBI", _RETURN, 0, 0, 0))
    program = struct.pack("HL", 1, ctypes.addressof(nothing))
    try:
        listening.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)
    except OSError:
        return False
    return True


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
