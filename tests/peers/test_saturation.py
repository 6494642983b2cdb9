"""The service beside bare onnxruntime: the bare loops, the callers, and how their numbers become shares."""

from __future__ import annotations

import asyncio
import io
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from loadtest.peers import bare, saturation
from loadtest.peers.bare import Bare, Subject, Way, measure
from loadtest.peers.callers import Closed, Overload, closed_loop, open_loop, rate_between_groups
from loadtest.peers.compare import Plan
from loadtest.peers.network import write_network
from loadtest.peers.roster import Request
from loadtest.peers.saturation import Round, best_way
from loadtest.peers.wrk import Load
from tables import shown


def test_a_bare_loop_tells_rows_per_second_and_the_time_of_a_run(tmp_path: Path) -> None:
    found = measure(Subject(write_network("mlp", tmp_path), "mlp"), Way(2, 1, 4), 0.1)
    assert found.rate > 1000
    assert 0 < found.p50_ms < 50


def test_the_best_way_is_that_of_the_highest_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saturation, "CORES", 2)
    monkeypatch.setattr(saturation, "quietly", lambda run, **_: run())
    rates = {Way(1, 2, 1): 5.0, Way(2, 1, 4): 9.0}
    monkeypatch.setattr(bare, "measure", lambda _, way, __: Bare(rates.get(way, 1.0), 1.0))
    assert best_way(Subject(Path(), "mlp"), Plan([8], 1, 1, 0), Console(file=io.StringIO())) == Way(2, 1, 4)
    assert len(saturation.ways()) == 10


def test_saturation_is_told_as_shares_of_the_bare_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saturation, "CORES", 2)
    flooded = Overload(1000, 90, (10.0, 20.0), {200: 90, 429: 910}, 0.2)
    item = Round(Bare(100, 9), {8: Closed(90, 1, 2, 0, 0.5)}, Load(1, 0, 10.5, 11, 1, 0), Bare(1, 10), flooded)
    text = shown(saturation.saturation_table([item, item], 5.0, "title"))
    # 90 of 100; wrk took 0.5 s of 2 x 5 s, so 90 of the 95 that it left.
    assert "90.0%" in text
    assert "5.0%" in text
    assert "94.7%" in text
    assert saturation.idle_line([item]) == "idle: p50 10.50 ms, bare 10.00 ms, added 0.50 ms"
    line = saturation.overload_line([item, item], 2, 3000)
    assert "goodput 100.0% of the peak" in line
    assert "{200: 180, 429: 1820}" in line


@contextmanager
def refusing_server(capacity: int) -> Iterator[int]:
    """Answers the first `capacity` requests of each 100 ms with 200, the others with 429."""
    spent: dict[int, int] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            slot = int(time.perf_counter() * 10)
            spent[slot] = spent.get(slot, 0) + 1
            status = 200 if spent[slot] <= capacity else 429
            writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\nok" % status)
        writer.close()

    with listening(serve) as port:
        yield port


@contextmanager
def listening(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> Iterator[int]:
    """A server in a thread of its own; its port."""
    loop = asyncio.new_event_loop()
    here = socket.create_server(("127.0.0.1", 0))
    server = loop.run_until_complete(asyncio.start_server(serve, sock=here, limit=2**24))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield here.getsockname()[1]
    finally:
        loop.call_soon_threadsafe(server.close)
        time.sleep(0.1)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_a_closed_loop_counts_who_was_answered() -> None:
    with refusing_server(capacity=1_000_000) as port:
        found = closed_loop(port, Request("/", {}, b"x"), connections=2, seconds=0.3)
    assert found.failed == 0
    assert 0 < found.p50_ms <= found.p99_ms
    assert found.client_cpu_s > 0
    with refusing_server(capacity=0) as port:
        found = closed_loop(port, Request("/", {}, b"x"), connections=2, seconds=0.1)
    assert (found.rate, found.failed > 10) == (0, True)


@pytest.mark.parametrize(
    ("times", "rate"),
    [
        ([], 0.0),
        ([1.0, 1.001], 0.0),
        ([1.0, 2.0], 1.0),
        ([1.0, 1.001, 2.0, 2.001, 3.0, 3.001], 4 / 2),  # two per second, whatever part of a group the end cuts off
    ],
)
def test_the_rate_is_taken_between_groups(times: list[float], rate: float) -> None:
    assert rate_between_groups(times) == pytest.approx(rate, rel=0.01)


def test_a_refusal_that_comes_before_the_request_is_sent_does_not_cut_it_off() -> None:
    size, ends = 8 * 2**20, []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 429 X\r\nContent-Length: 2\r\n\r\nno")
                await asyncio.sleep(0.02)  # the buffers between them are full, and the reply is there
                body = await reader.readexactly(size)
                ends.append((body[:1], body[-1:]))
        except asyncio.IncompleteReadError:
            writer.close()

    with listening(serve) as port:
        found = open_loop(port, Request("/", {}, b"<" + b"x" * (size - 2) + b">"), 100, 0.5, connections=2)
    assert set(found.statuses) == {429}
    assert found.statuses[429] >= 4
    assert set(ends) == {(b"<", b">")}


def test_an_open_loop_offers_its_rate_and_counts_who_was_answered() -> None:
    with refusing_server(capacity=4) as port:
        found = open_loop(port, Request("/", {}, b"x"), rate=400, seconds=1, connections=16)
    assert 250 < found.offered <= 420  # a busy machine skips turns
    assert 10 < found.goodput <= 48
    assert set(found.statuses) == {200, 429}
    assert len(found.answered_ms) == found.statuses[200]
