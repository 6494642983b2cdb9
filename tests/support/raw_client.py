"""HTTP over a socket, byte by byte as a test wants it."""

from __future__ import annotations

import json
import socket

from fakes import Live


class Client:
    """One connection."""

    def __init__(self, live: Live) -> None:
        self.socket = socket.create_connection(live.host_and_port, timeout=10)
        self.file = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def reply(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next reply."""
        status = int(self.file.readline().split()[1])
        headers = {}
        while (line := self.file.readline().decode().strip()) != "":
            name, _, value = line.partition(": ")
            headers[name] = value
        return status, headers, self.file.read(int(headers["content-length"]))

    def ask(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        self.send(data)
        return self.reply()

    def pixels(self) -> list[float]:
        """The outputs of the next reply."""
        status, _, body = self.reply()
        assert status == 200, body
        return [float(value) for value in json.loads(body)["outputs"][0]["data"]]

    def close(self) -> None:
        self.file.close()
        self.socket.close()

    def is_closed(self) -> bool:
        """Whether the server has closed it; waits for that."""
        return self.file.read(1) == b""
