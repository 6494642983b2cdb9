"""HTTP/2 by hand, as far as a call over gRPC needs it that stalls on purpose."""

from __future__ import annotations

import socket
import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING = 0, 1, 4, 6
ACK, END_HEADERS = 1, 4
WINDOW = 65_535
"""Bytes that a server takes before it says that it takes more."""
FRAME = 16_384


def frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    """RFC 9113, 4.1."""
    return struct.pack(">I", len(content))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + content


def _literal(name: bytes, value: bytes) -> bytes:
    """RFC 7541, 6.2.2: without any table."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def call(method: bytes) -> bytes:
    """The head of a call, on the first stream of a new connection."""
    head = {b":method": b"POST", b":scheme": b"http", b":path": method, b":authority": b"x"}
    head |= {b"te": b"trailers", b"content-type": b"application/grpc"}
    block = b"".join(_literal(name, value) for name, value in head.items())
    return PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, block)


class StallingCall:
    """A call that announces a message, sends what the server takes of it at once, and no more than `sent` bytes."""

    def __init__(self, port: int, method: bytes, announced: int, sent: int | bytes) -> None:
        """`sent`: the bytes, or how many zeros."""
        self._socket = socket.create_connection(("127.0.0.1", port), 20)
        self._socket.settimeout(0)
        self._send(call(method))
        self._left = struct.pack(">BI", 0, announced) + (sent if isinstance(sent, bytes) else bytes(sent))
        self._window = {0: WINDOW, 1: WINDOW}
        self._came = b""
        self.is_ended = False
        """Whether the server has ended the call."""

    def go_on(self) -> None:
        """Read what the server says, and send what it takes. Call it again and again."""
        try:
            while came := self._socket.recv(2**16):
                self._came += came
            self.is_ended = True
        except BlockingIOError:
            pass
        except OSError:
            self.is_ended = True
        while len(self._came) >= 9 and len(self._came) >= 9 + (size := int.from_bytes(self._came[:3])):
            kind, flags, stream = self._came[3], self._came[4], int.from_bytes(self._came[5:9])
            self._take(kind, flags, stream, self._came[9 : 9 + size])
            self._came = self._came[9 + size :]
        while not self.is_ended and (size := min(FRAME, len(self._left), *self._window.values())) > 0:
            self._send(frame(DATA, 0, 1, self._left[:size]))
            self._left = self._left[size:]
            self._window = {stream: window - size for stream, window in self._window.items()}

    def _take(self, kind: int, flags: int, stream: int, content: bytes) -> None:
        if kind == SETTINGS and not flags & ACK:
            self._send(frame(SETTINGS, ACK, 0))
            settings = dict(struct.iter_unpack(">HI", content))
            self._window[1] += settings.get(4, WINDOW) - WINDOW
        elif kind == PING and not flags & ACK:
            self._send(frame(PING, ACK, 0, content))
        elif kind == 8:  # WINDOW_UPDATE
            self._window[stream] += int.from_bytes(content)
        elif stream == 1:  # a status, or a reset
            self.is_ended = True

    def _send(self, data: bytes) -> None:
        self._socket.settimeout(20)
        try:
            self._socket.sendall(data)
        except OSError:
            self.is_ended = True
        self._socket.settimeout(0)

    def close(self) -> None:
        """Leave."""
        self._socket.close()
