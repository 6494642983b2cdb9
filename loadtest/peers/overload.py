"""More requests than a server can answer, at a steady pace: an open loop, unlike wrk, which waits for its replies.

Each connection asks at its own turns; if a reply comes later than the next turn, that turn is skipped, so enough
connections are needed for those who are admitted to wait while the others go on asking.
"""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple

from loadtest.peers.process import HOST
from loadtest.peers.roster import Request


class Overload(NamedTuple):
    """Requests sent and answered (200) per second, milliseconds of all answered ones, and replies by status."""

    offered: float
    goodput: float
    answered_ms: tuple[float, ...]
    statuses: dict[int, int]


def overload(port: int, request: Request, rate: float, seconds: float, connections: int) -> Overload:
    """Ask `rate` times a second for so many seconds; replies that come afterwards are waited for, and not counted."""
    return asyncio.run(_flood(port, _bytes_of(request), rate, seconds, connections))


def _bytes_of(request: Request) -> bytes:
    headers = request.headers | {"Host": HOST, "Content-Length": str(len(request.body))}
    lines = [f"POST {request.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + request.body


async def _flood(port: int, request: bytes, rate: float, seconds: float, connections: int) -> Overload:
    period = connections / rate
    begin = time.perf_counter() + 0.2
    end = begin + seconds
    replies: list[tuple[int, float]] = []

    async def caller(number: int) -> None:
        reader, writer = await asyncio.open_connection(HOST, port)
        due = begin + period * number / connections
        while due < end:
            await asyncio.sleep(due - time.perf_counter())
            asked = time.perf_counter()
            writer.write(request)
            status = await _status(reader)
            now = time.perf_counter()
            if now < end:
                replies.append((status, (now - asked) * 1000))
            while due <= now:
                due += period
        writer.close()

    await asyncio.gather(*map(caller, range(connections)))
    answered = tuple(ms for status, ms in replies if status == 200)
    statuses = {status: sum(each == status for each, _ in replies) for status in {status for status, _ in replies}}
    return Overload(len(replies) / seconds, len(answered) / seconds, answered, statuses)


async def _status(reader: asyncio.StreamReader) -> int:
    """The status of the next reply, read to its end."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    await reader.readexactly(int(length.partition(b":")[2]))
    return int(head.split(b" ", 2)[1])
