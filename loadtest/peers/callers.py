"""Callers in this process, for models so slow that a Python client costs nothing beside them.

`closed_loop` has each of its callers ask again as soon as it is answered, as wrk does; but replies come in groups, of
the size of a batch, and wrk counts a group that comes just after its end as nothing. Here the rate is that between the
first group and the last. `open_loop` asks at a steady pace, whatever the server manages.
"""

from __future__ import annotations

import asyncio
import resource
import time
from collections import Counter
from typing import NamedTuple

import numpy as np

from loadtest.peers.process import HOST
from loadtest.peers.roster import Request

_GROUP_S = 0.002
"""Replies that come closer together than that are of one batch."""


class Closed(NamedTuple):
    """Answers per second, their milliseconds, replies that were none, and CPU seconds of the callers."""

    rate: float
    p50_ms: float
    p99_ms: float
    failed: int
    client_cpu_s: float


class Overload(NamedTuple):
    """Requests sent and answered (200) per second, milliseconds of all answered ones, and replies by status."""

    offered: float
    goodput: float
    answered_ms: tuple[float, ...]
    statuses: dict[int, int]


def closed_loop(port: int, request: Request, connections: int, seconds: float) -> Closed:
    """Load by so many callers for so many seconds; requests in flight then are waited for, and not counted."""
    before = _cpu_s()
    replies = asyncio.run(_closed(port, _bytes_of(request), connections, seconds))
    answered = sorted((at, ms) for status, at, ms in replies if status == 200)
    times = [ms for _, ms in answered] or [float("nan")]
    p50, p99 = np.percentile(times, [50, 99])
    rate = rate_between_groups([at for at, _ in answered])
    return Closed(rate, float(p50), float(p99), len(replies) - len(answered), _cpu_s() - before)


def rate_between_groups(times: list[float]) -> float:
    """Replies per second from the end of the first group of (ascending) times to the last reply; 0 for one group."""
    first = next((index for index in range(1, len(times)) if times[index] - times[index - 1] > _GROUP_S), len(times))
    rest = len(times) - first
    return rest / (times[-1] - times[first - 1]) if rest else 0.0


def open_loop(port: int, request: Request, rate: float, seconds: float, connections: int) -> Overload:
    """Ask `rate` times a second for so many seconds; what is answered afterwards is waited for, and not counted.

    Each connection asks at its own turns; if a reply comes later than the next turn, that turn is skipped, so enough
    connections are needed for those who are admitted to wait while the others go on asking.
    """
    replies = asyncio.run(_open(port, _bytes_of(request), rate, seconds, connections))
    answered = tuple(ms for status, ms in replies if status == 200)
    statuses = dict(Counter(status for status, _ in replies))
    return Overload(len(replies) / seconds, len(answered) / seconds, answered, statuses)


def _bytes_of(request: Request) -> bytes:
    headers = request.headers | {"Host": HOST, "Content-Length": str(len(request.body))}
    lines = [f"POST {request.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + request.body


async def _closed(port: int, request: bytes, connections: int, seconds: float) -> list[tuple[int, float, float]]:
    end = time.perf_counter() + seconds
    replies: list[tuple[int, float, float]] = []

    async def caller() -> None:
        reader, writer = await asyncio.open_connection(HOST, port)
        while (asked := time.perf_counter()) < end:
            writer.write(request)
            status = await _status(reader)
            now = time.perf_counter()
            if now < end:
                replies.append((status, now, (now - asked) * 1000))
        writer.close()

    await asyncio.gather(*(caller() for _ in range(connections)))
    return replies


async def _open(port: int, request: bytes, rate: float, seconds: float, connections: int) -> list[tuple[int, float]]:
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
    return replies


async def _status(reader: asyncio.StreamReader) -> int:
    """The status of the next reply, read to its end."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    await reader.readexactly(int(length.partition(b":")[2]))
    return int(head.split(b" ", 2)[1])


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
