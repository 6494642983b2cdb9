"""Callers in this process, for models so slow that a Python client costs next to nothing beside them.

`closed_loop` has each of its callers ask again as soon as it is answered, as wrk does; but replies come in groups, of
the size of a batch, and wrk counts a group that comes just after its end as nothing. Here the rate is that between the
first group and the last. `open_loop` asks at a steady pace, whatever the server manages.
"""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import numpy as np
import uvloop

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
    """Replies per second, those that answered (200), their milliseconds, statuses, CPU seconds of the callers.

    Like the rate of `Closed`, goodput is that between the first group and the last: the first comes as late as a batch
    takes, whatever the load.
    """

    offered: float
    goodput: float
    answered_ms: tuple[float, ...]
    statuses: dict[int, int]
    client_cpu_s: float


def closed_loop(port: int, request: Request, connections: int, seconds: float) -> Closed:
    """Load by so many callers for so many seconds; requests in flight then are waited for, and not counted."""
    before = _cpu_s()
    replies = uvloop.run(_closed(port, _bytes_of(request), connections, seconds))
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
    connections are needed for those who are admitted to wait while the others go on asking. The callers do not push the
    server from its cores whenever one of them has its turn, as they would not if they had machines of their own.
    """
    before = _cpu_s()
    with _unhurried():
        replies = uvloop.run(_open(port, _bytes_of(request), rate, seconds, connections))
    answered = sorted((at, ms) for status, at, ms in replies if status == 200)
    goodput = rate_between_groups([at for at, _ in answered])
    statuses = dict(Counter(status for status, _, _ in replies))
    times = tuple(ms for _, ms in answered)
    return Overload(len(replies) / seconds, goodput, times, statuses, _cpu_s() - before)


@contextmanager
def _unhurried() -> Iterator[None]:
    """Linux lets this thread wait for the end of another's time slice (sched(7), SCHED_BATCH)."""
    before, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, before, parameters)


def _bytes_of(request: Request) -> bytes:
    headers = request.headers | {"Host": HOST, "Content-Length": str(len(request.body))}
    lines = [f"POST {request.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + request.body


async def _closed(port: int, request: bytes, connections: int, seconds: float) -> list[tuple[int, float, float]]:
    end = time.perf_counter() + seconds
    replies: list[tuple[int, float, float]] = []

    def replied(caller: _Caller, status: int, now: float) -> None:
        if now < end:
            replies.append((status, now, (now - caller.asked) * 1000))
            caller.ask()
        else:
            caller.leave()

    callers = await _connect(port, request, connections, replied)
    for caller in callers:
        caller.ask()
    await asyncio.gather(*(caller.left for caller in callers))
    return replies


async def _open(
    port: int, request: bytes, rate: float, seconds: float, connections: int
) -> list[tuple[int, float, float]]:
    loop = asyncio.get_running_loop()
    period = connections / rate
    replies: list[tuple[int, float, float]] = []

    def replied(caller: _Caller, status: int, now: float) -> None:
        if now < end:
            replies.append((status, now, (now - caller.asked) * 1000))
        caller.due += period
        while caller.due <= now:
            caller.due += period
        ask_later(caller)

    def ask_later(caller: _Caller) -> None:
        if caller.due < end:
            loop.call_later(caller.due - time.perf_counter(), caller.ask)
        else:
            caller.leave()

    callers = await _connect(port, request, connections, replied)
    begin = time.perf_counter() + 0.2
    end = begin + seconds
    for number, caller in enumerate(callers):
        caller.due = begin + period * number / connections
        ask_later(caller)
    await asyncio.gather(*(caller.left for caller in callers))
    return replies


class _Caller(asyncio.Protocol):
    """One connection, which sends the same request whenever it is told to, and tells the status of each whole reply."""

    def __init__(self, request: bytes, replied: Callable[[_Caller, int, float], None]) -> None:
        self.asked = self.due = 0.0
        self.left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._replied = replied
        self._transport: asyncio.Transport
        self._received = b""
        self._size = 0

    def ask(self) -> None:
        self.asked = time.perf_counter()
        self._transport.write(self._request)

    def leave(self) -> None:
        self.left.set_result(None)
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._size:
            end = self._received.find(b"\r\n\r\n") + 4
            if end == 3:
                return
            lines = self._received[:end].lower().split(b"\r\n")
            length = next(line for line in lines if line.startswith(b"content-length:"))
            self._size = end + int(length.partition(b":")[2])
        if len(self._received) >= self._size:
            status = int(self._received.split(b" ", 2)[1])
            self._received, self._size = b"", 0
            self._replied(self, status, time.perf_counter())

    def connection_lost(self, error: Exception | None) -> None:
        if not self.left.done():
            self.left.set_exception(error or ConnectionResetError("the server closed the connection before its reply"))


async def _connect(
    port: int, request: bytes, connections: int, replied: Callable[[_Caller, int, float], None]
) -> list[_Caller]:
    loop = asyncio.get_running_loop()
    made = [await loop.create_connection(lambda: _Caller(request, replied), HOST, port) for _ in range(connections)]
    return [caller for _, caller in made]


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
