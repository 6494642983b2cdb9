"""A connection between a transport and a clock of the test: what it writes, when it closes, what it remembers."""

from __future__ import annotations

from asyncio import Future
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from fakes import Live, live_server
from leanserve.api.routes import HotPath
from leanserve.api.v1.predict import plain_body
from leanserve.http.connection import connections_to
from leanserve.http.messages import Caller, Reply, Route


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server() as server:
        yield server


async def no_app(*_: Any) -> None:
    raise AssertionError("only the one route is asked")


class Transport:
    """Takes what is written."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closing = False

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
    """A loop of which only the timers are used."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Any]] = []
        self.tasks: list[Any] = []

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def call_later(self, seconds: float, call: Any) -> Any:
        self.timers.append((self.now + seconds, call))
        return SimpleNamespace(cancel=self.timers.clear)

    def create_task(self, coroutine: Any) -> Future[None]:
        coroutine.close()
        self.tasks.append(coroutine)
        return Future(loop=self)  # type: ignore[arg-type]  # the little of a loop that is needed here

    def run_until(self, now: float) -> None:
        while self.timers and self.timers[0][0] <= now:
            self.now, call = self.timers.pop(0)
            call()
        self.now = now


class Bench:
    """A connection over a transport and a clock of the test, to an app with one route that replies with `body`."""

    def __init__(self, live: Live, body: bytes = b"{}", *, reads: bool = True) -> None:
        self.reads = reads
        hot = HotPath(live.fleet, no_app)
        hot._routes = {"/p": Route("POST", "prediction", self.route)}
        config = uvicorn.Config(hot, http=connections_to(hot), lifespan="off", log_level="critical")
        config.load()
        self.body = body
        self.clock, self.transport = Clock(), Transport()
        make: Any = config.http_protocol_class
        self.connection = make(config=config, server_state=ServerState(), app_state={}, _loop=self.clock)
        self.connection.connection_made(self.transport)
        self.request = b"POST /p HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\n{}"
        headers = [(b"host", b"x"), (b"content-length", b"2")]
        scope = {"method": "POST", "path": "/p", "headers": headers}
        self.connection.heads.learn(self.request[:-2], scope, 2)

    async def route(self, caller: Caller) -> Reply:
        if self.reads:
            await plain_body(caller, 2)
        return Reply(self.body, ())

    def ask(self) -> None:
        self.connection.data_received(self.request)


def test_a_reply_is_one_write_unless_it_is_large(live: Live) -> None:
    small, large = Bench(live), Bench(live, bytes(100_000))
    small.ask()
    large.ask()
    assert small.transport.writes == [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"]
    assert large.transport.writes == [b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n", bytes(100_000)]


def test_an_idle_connection_is_closed_in_time_and_a_used_one_is_not(live: Live) -> None:
    bench = Bench(live)
    for second in range(0, 20, 2):
        bench.clock.run_until(second)
        bench.ask()
    bench.clock.run_until(22.9)
    assert not bench.transport.closing
    assert len(bench.clock.timers) == 1
    bench.clock.run_until(23.1)
    assert bench.transport.closing


def test_a_connection_that_waits_for_its_reply_is_not_idle(live: Live) -> None:
    bench = Bench(live)
    bench.ask()
    bench.connection.cycle.response_complete = False
    bench.clock.run_until(60)
    assert not bench.transport.closing


def test_a_client_that_does_not_read_its_replies_gets_no_further_ones_on_the_short_way(live: Live) -> None:
    bench = Bench(live)
    bench.ask()
    bench.connection.pause_writing()
    bench.ask()
    assert len(bench.transport.writes) == 1
    assert len(bench.clock.tasks) == 1  # uvicorn's way, which waits until the client has read


def test_only_so_many_heads_are_remembered(live: Live) -> None:
    heads = Bench(live).connection.heads
    known = [b"POST /p HTTP/1.1\r\ncontent-length: 2\r\nx: %d\r\n\r\n" % number for number in range(300)]
    for number, head in enumerate(known):
        headers = [(b"content-length", b"2"), (b"x", b"%d" % number)]
        heads.learn(head, {"method": "POST", "path": "/p", "headers": headers}, 2)
    assert heads.get(known[-1]) is not None
    assert sum(heads.get(head) is not None for head in known) <= 256


def test_a_failure_that_nobody_foresaw_closes_the_connection(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(live)

    async def fail(*_: Any) -> Reply:
        raise SystemExit("out of the blue")

    monkeypatch.setattr(HotPath, "answer", fail)
    bench.ask()
    assert bench.transport.closing
    assert bench.transport.writes == []


def test_a_body_that_is_still_coming_keeps_its_connection_open(live: Live) -> None:
    bench = Bench(live)
    bench.ask()
    bench.connection.data_received(bench.request[:-1])
    bench.clock.run_until(60)
    bench.connection.shutdown()
    assert not bench.transport.closing
    bench.connection.data_received(bench.request[-1:])
    assert b"connection: close" in bench.transport.writes[-1]
    assert bench.transport.closing


def test_a_reply_that_needs_no_body_comes_before_it_and_the_connection_lives_on(live: Live) -> None:
    bench = Bench(live, reads=False)
    for count in (1, 2):
        bench.connection.data_received(bench.request[:-1])
        assert len(bench.transport.writes) == count, "the last byte is still to come"
        bench.clock.run_until(60 * count)
        assert not bench.transport.closing
        bench.connection.data_received(bench.request[-1:])
    bench.ask()
    assert len(bench.transport.writes) == 3
