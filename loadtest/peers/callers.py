"""Callers in this process, for models so slow that a Python client costs next to nothing beside them.

`closed_loop` has each of its callers ask again as soon as it is answered, as wrk does; but replies come in groups, of
the size of a batch, and wrk counts a group that comes just after its end as nothing. Here the rate is that between the
first group and the last. `open_loop` asks at a steady pace, whatever the server manages.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import uvloop

from loadtest.peers.process import HOST
from loadtest.peers.roster import Request

_PIECE = 2**16
_GROUP_S = 0.002
"""Replies that come closer together than that are of one batch."""
_TURN_S = 0.02
"""Those who ask at a steady pace do so together so often: a wake-up for each of them would take the server's cores from
it hundreds of times a second, and each time much of what their caches hold."""


class Closed(NamedTuple):
    """Answers per second, their milliseconds, replies that were none, and CPU seconds of the callers."""

    rate: float
    p50_ms: float
    p99_ms: float
    failed: int
    client_cpu_s: float


class Overload(NamedTuple):
    """Requests and answers (200) per second, their milliseconds, all statuses, CPU seconds of the callers.

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
    with _on_the_wire(request) as sent:
        replies = uvloop.run(_closed(port, sent, connections, seconds))
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

    A turn is skipped if no connection is free then, so enough are needed for those who are admitted to wait while the
    others go on asking; `offered` tells how many asked. The callers do not push the server from its cores whenever one
    of them has its turn, as they would not if they had machines of their own.
    """
    before = _cpu_s()
    with _unhurried(), _on_the_wire(request) as sent:
        asked, replies = uvloop.run(_open(port, sent, rate, seconds, connections))
    answered = sorted((at, ms) for status, at, ms in replies if status == 200)
    goodput = rate_between_groups([at for at, _ in answered])
    statuses = dict(Counter(status for status, _, _ in replies))
    times = tuple(ms for _, ms in answered)
    return Overload(asked / seconds, goodput, times, statuses, _cpu_s() - before)


@contextmanager
def _unhurried() -> Iterator[None]:
    """Linux lets this thread wait for the end of another's time slice (sched(7), SCHED_BATCH)."""
    before, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, before, parameters)


async def _closed(port: int, sent: _Sent, connections: int, seconds: float) -> list[tuple[int, float, float]]:
    end = time.perf_counter() + seconds
    replies: list[tuple[int, float, float]] = []

    def replied(caller: _Caller, status: int, now: float) -> None:
        if now < end:
            replies.append((status, now, (now - caller.asked) * 1000))
            caller.ask()
        else:
            caller.leave()

    callers = [_Caller(port, sent, replied) for _ in range(connections)]
    for caller in callers:
        caller.ask()
    await asyncio.gather(*(caller.left for caller in callers))
    return replies


async def _open(
    port: int, sent: _Sent, rate: float, seconds: float, connections: int
) -> tuple[int, list[tuple[int, float, float]]]:
    loop = asyncio.get_running_loop()
    replies: list[tuple[int, float, float]] = []
    turns = asked = 0

    def replied(caller: _Caller, status: int, now: float) -> None:
        if now < end:
            replies.append((status, now, (now - caller.asked) * 1000))
            free.append(caller)
        else:
            caller.leave()

    def turn() -> None:
        nonlocal turns, asked
        now = time.perf_counter()
        if now >= end:
            for caller in free:
                caller.leave()
            return
        while begin + turns / rate <= now:
            turns += 1
            if free:
                asked += 1
                free.popleft().ask()
        loop.call_later(_TURN_S, turn)

    callers = [_Caller(port, sent, replied) for _ in range(connections)]
    free = deque(callers)
    begin = time.perf_counter()
    end = begin + seconds
    turn()
    await asyncio.gather(*(caller.left for caller in callers))
    return asked, replies


class _Sent(NamedTuple):
    """A request as it goes over the wire: a file, and its bytes."""

    file: int
    size: int


@contextmanager
def _on_the_wire(request: Request) -> Iterator[_Sent]:
    headers = request.headers | {"Host": HOST, "Content-Length": str(len(request.body))}
    lines = [f"POST {request.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    with tempfile.TemporaryFile() as file:
        size = file.write("\r\n".join(lines).encode() + b"\r\n\r\n" + request.body)
        file.flush()
        yield _Sent(file.fileno(), size)


class _Caller:
    """One connection, which sends the same request whenever it is told to, and tells the status of each whole reply.

    The request goes from its file to the socket without a copy (sendfile(2)): those of callers with machines of their
    own would not pass through the caches of these cores on the way out.
    """

    def __init__(self, port: int, request: _Sent, replied: Callable[[_Caller, int, float], None]) -> None:
        self.asked = 0.0
        self.left: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._replied = replied
        self._sent = self._size = self._status = 0
        self._received = b""
        self._loop = asyncio.get_running_loop()
        self._socket = socket.create_connection((HOST, port))
        self._socket.settimeout(0)
        self._loop.add_reader(self._socket, self._receive)

    def ask(self) -> None:
        self.asked = time.perf_counter()
        self._sent = 0
        self._send()

    def leave(self, error: Exception | None = None) -> None:
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        if error is None:
            self.left.set_result(None)
        else:
            self.left.set_exception(error)

    def _send(self, *, again: bool = False) -> None:
        file, size = self._request
        try:
            while self._sent < size:
                self._sent += os.sendfile(self._socket.fileno(), file, self._sent, size - self._sent)
        except BlockingIOError:
            if not again:
                self._loop.add_writer(self._socket, partial(self._send, again=True))
        except OSError as error:
            self.leave(error)
        else:
            if again:
                self._loop.remove_writer(self._socket)
            self._look()

    def _receive(self) -> None:
        try:
            data = self._socket.recv(_PIECE)
        except OSError as error:
            self.leave(error)
            return
        if not data:
            self.leave(ConnectionResetError("the server closed the connection before its reply"))
            return
        self._received += data
        if not self._size:
            end = self._received.find(b"\r\n\r\n") + 4
            if end == 3:
                return
            lines = self._received[:end].lower().split(b"\r\n")
            length = next(line for line in lines if line.startswith(b"content-length:"))
            self._size = end + int(length.partition(b":")[2])
        if len(self._received) >= self._size:
            self._status = int(self._received.split(b" ", 2)[1])
            self._received, self._size = b"", 0
            self._look()

    def _look(self) -> None:
        """Tell the status once the request is sent, too: a refusal may come before."""
        if self._status and self._sent == self._request.size:
            status, self._status = self._status, 0
            self._replied(self, status, time.perf_counter())


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
