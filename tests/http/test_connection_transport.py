"""A connection over a transport and a clock of the test: what it writes, and when it closes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvicorn
from uvicorn.server import ServerState

from leanserve.config.limits_section import LimitsConfig
from leanserve.http import exchange
from leanserve.http.connection import connections_to
from leanserve.http.messages import Request, Response, read_body
from leanserve.http.open_connections import OpenConnections

HEAD = b"POST /p HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n"


class Transport:
    """Takes what is written."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closing = False
        self.unread = 0

    def get_write_buffer_size(self) -> int:
        return self.unread

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = True

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def close(self) -> None:
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing

    def get_extra_info(self, _name: str) -> None:
        return None

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Clock:
    """The running loop, with timers that go by the test's time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Any]] = []
        self._loop = asyncio.get_running_loop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, call: Any, *args: Any) -> Any:
        self.timers.append((self.now + seconds, partial(call, *args)))
        return SimpleNamespace(cancel=self.timers.clear)

    def run_until(self, now: float) -> None:
        while self.timers and self.timers[0][0] <= now:
            self.now, call = self.timers.pop(0)
            call()
        self.now = now


class Bench:
    """A connection to `answer` at POST /p, and to nothing else."""

    def __init__(self, answer: Callable[[Request], Awaitable[Response | None]]) -> None:
        self.slow: list[str] = []
        find = {(b"POST", b"/p"): answer}
        self.everyone = OpenConnections(LimitsConfig(body_bytes=1000, keep_alive_s=5).http)
        http = connections_to(lambda *asked: find.get(asked), self.everyone)
        config = uvicorn.Config(self._app, http=http, interface="asgi3", lifespan="off", log_level="critical")
        config.load()
        self.clock, self.transport = Clock(), Transport()
        make: Any = config.http_protocol_class
        self.connection = make(config=config, server_state=ServerState(), app_state={}, _loop=self.clock)
        self.connection.connection_made(self.transport)

    async def _app(self, scope: Any, *_: Any) -> None:
        self.slow.append(scope["path"])

    async def send(self, data: bytes = HEAD + b"{}") -> None:
        self.connection.data_received(data)
        for _ in range(5):
            await asyncio.sleep(0)


def replies(body: bytes = b"{}") -> Callable[[Request], Awaitable[Response | None]]:
    async def answer(caller: Request) -> Response:
        if caller.body is None:
            await read_body(caller, 2)
        return Response(body, ())

    return answer


async def at_once(_: Request) -> Response:
    return Response(b"{}", ())


def test_a_response_is_one_write_unless_it_is_large() -> None:
    async def run() -> None:
        small, large = Bench(replies()), Bench(replies(bytes(100_000)))
        await small.send()
        await large.send()
        assert small.transport.writes == [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"]
        assert large.transport.writes == [b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n", bytes(100_000)]

    asyncio.run(run())


def test_a_task_that_ends_at_once_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tasks of Python 3.12 and later do, which begin before they are there."""

    def at_once_or_later(loop: Any, run: Any) -> asyncio.Task[None]:
        try:
            run.send(None)
        except StopIteration:
            return cast("asyncio.Task[None]", SimpleNamespace(done=lambda: True))
        raise AssertionError("it was to end at once")

    async def run() -> None:
        bench = Bench(at_once)
        for _ in range(3):
            await bench.send()
        assert len(bench.transport.writes) == 3
        assert not bench.connection.tasks

    monkeypatch.setattr(exchange, "_task", at_once_or_later)
    asyncio.run(run())


def test_an_idle_connection_is_closed_in_time_and_a_used_one_is_not() -> None:
    async def run() -> None:
        bench = Bench(replies())
        for second in range(0, 20, 2):
            bench.clock.run_until(second)
            await bench.send()
        bench.clock.run_until(22.9)
        assert not bench.transport.closing
        assert len(bench.clock.timers) == 1
        bench.clock.run_until(24.1)  # a sweep later
        assert bench.transport.closing

    asyncio.run(run())


def test_a_connection_that_waits_for_its_response_is_not_idle() -> None:
    async def run() -> None:
        asked = asyncio.Event()

        async def answer(_: Request) -> Response:
            await asked.wait()
            return Response(b"{}", ())

        bench = Bench(answer)
        await bench.send()
        bench.clock.run_until(60)
        assert not bench.transport.closing
        asked.set()
        await bench.send(b"")
        assert len(bench.transport.writes) == 1

    asyncio.run(run())


def test_a_client_that_does_not_read_its_responses_gets_no_further_ones_on_the_short_way() -> None:
    async def run() -> None:
        bench = Bench(replies())
        await bench.send()
        bench.connection.pause_writing()
        await bench.send()
        assert len(bench.transport.writes) == 1
        assert bench.slow == ["/p"]  # uvicorn's way, which waits until the client has read

    asyncio.run(run())


def test_a_failure_that_nobody_foresaw_closes_the_connection() -> None:
    async def fail(_: Request) -> Response:
        raise RuntimeError("out of the blue")

    async def run() -> None:
        bench = Bench(fail)
        await bench.send()
        assert bench.transport.closing
        assert bench.transport.writes == []

    asyncio.run(run())


def test_a_body_that_is_still_coming_keeps_its_connection_open() -> None:
    async def run() -> None:
        bench = Bench(replies())
        await bench.send()
        await bench.send(HEAD + b"{")
        bench.clock.run_until(60)
        bench.everyone.drain()
        assert not bench.transport.closing
        await bench.send(b"}")
        assert b"connection: close" in bench.transport.writes[-1]
        assert bench.transport.closing

    asyncio.run(run())


def test_a_response_that_needs_no_body_comes_before_it_and_the_connection_lives_on() -> None:
    async def run() -> None:
        bench = Bench(at_once)
        for count in (1, 2):
            await bench.send(HEAD + b"{")
            assert len(bench.transport.writes) == count, "the last byte is still to come"
            bench.clock.run_until(60 * count)
            assert not bench.transport.closing
            await bench.send(b"}")
        await bench.send()
        assert len(bench.transport.writes) == 3

    asyncio.run(run())


@pytest.mark.parametrize("pieces", [1, 3])
def test_what_is_no_http_is_refused_once_and_the_connection_closed(pieces: int) -> None:
    async def run() -> None:
        bench = Bench(replies())
        for _ in range(pieces):
            await bench.send(b"\x00\x01 nonsense\r\n\r\n")
        assert bench.transport.closing
        assert bench.transport.writes[0].startswith(b"HTTP/1.1 400 ")

    asyncio.run(run())
