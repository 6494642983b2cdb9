"""The short way of a connection against uvicorn's own: the same responses, on every request like on the first."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fakes import Live, live_server
from leanserve.errors import BadInput
from leanserve.serving.variant import Variant
from raw_client import Client

INFER = "/v2/models/pixels/versions/a/infer"
LIMIT = 4096
SEEN = ContextVar("SEEN", default=0)
ROW = np.array([[[[0, 1], [2, 3]]]], np.float32)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server(limits={"body_bytes": LIMIT}) as server:
        yield server


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the requests that take uvicorn's way."""
    seen: list[str] = []
    original = HttpToolsProtocol.on_headers_complete

    def spy(self: HttpToolsProtocol) -> None:
        original(self)
        seen.append(self.scope["path"])

    monkeypatch.setattr(HttpToolsProtocol, "on_headers_complete", spy)
    return seen


def infer(pixel: float = 1.0, path: str = INFER, headers: str = "", **changes: Any) -> bytes:
    """An infer request; its head is the same for all pixels from 0 to 9."""
    data = (ROW + pixel).ravel().tolist()
    tensor = {"name": "image", "shape": [1, 1, 2, 2], "datatype": "FP32", "data": data, **changes}
    body = json.dumps({"inputs": [tensor]})
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {len(body)}\r\n\r\n"
    return (head + body).encode()


@pytest.fixture
def client(live: Live) -> Iterator[Client]:
    made = Client(live)
    yield made
    made.close()


def answer_to(pixel: float) -> list[float]:
    return [float(value) for value in ((ROW + pixel) * 10).ravel()]


def without_times(reply: tuple[int, dict[str, str], bytes]) -> tuple[int, dict[str, str], bytes]:
    status, headers, body = reply
    body = gzip.decompress(body) if "content-encoding" in headers else body
    still = {name: value for name, value in headers.items() if name not in {"date", "content-length"}}
    return status, still, re.sub(rb'"(queue|inference)_ms":[\d.]+', b"", body)


@pytest.mark.parametrize(
    "request_",
    [
        infer(),
        infer(headers="x-variant: b\r\n", path="/v2/models/pixels/infer"),
        infer(headers="accept-encoding: gzip\r\n", path=INFER + "?q=1"),
        infer(datatype="FP99"),
        infer(path="/v2/models/pixels/versions/poor/infer"),
        infer(headers="x-variant: none\r\n", path="/v2/models/pixels/infer"),
        infer(path="/v2/models/pixels/versions/broken/infer", data=[1, 1, 1, 1]),
        infer(path="/v1/predict", headers="content-type: image/png\r\nx-variant: a\r\n"),
    ],
    ids=["infer", "variant", "packed", "refused", "excluded", "unknown", "broken", "predict"],
)
def test_both_ways_give_the_same_response(
    live: Live, client: Client, slow: list[str], monkeypatch: pytest.MonkeyPatch, request_: bytes
) -> None:
    request_ = request_.replace(b"host: x\r\n", b"host: x\r\nx-request-id: same\r\n")
    short = client.ask(request_)
    assert slow == []
    monkeypatch.setattr(live.server.config.http_protocol_class, "find", staticmethod(lambda *_: None))
    long = client.ask(request_)
    assert len(slow) == 1
    assert without_times(long) == without_times(short)
    assert set(short[1]) == set(long[1])


def test_every_head_takes_the_short_way(live: Live, client: Client, slow: list[str]) -> None:
    for number in range(5):
        client.send(infer(number, headers=f"x-request-id: {number}\r\ntraceparent: 00-{number:032x}-1-01\r\n"))
        assert client.pixels() == answer_to(number)
    other = Client(live)
    other.send(infer(5))
    assert other.pixels() == answer_to(5)
    other.close()
    assert slow == []


def test_requests_on_the_short_way_are_counted_like_others(live: Live, client: Client) -> None:
    counted = live.fleet.metrics.variants["a"].requests["ok"]
    before = counted.count
    for _ in range(5):
        client.ask(infer())
    assert counted.count == before + 5


@pytest.mark.parametrize(
    "head",
    [
        "connection: close\r\n",
        "expect: 100-continue\r\n",
        "content-encoding: identity\r\n",
        "x-variant: a\r\nX-Variant: a\r\n",
        "connection: upgrade\r\n",
        "upgrade: h2c\r\n",
        "connection: upgrade\r\nupgrade: h2c\r\n",
        "http2-settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n",
        "te: trailers\r\n",
        "trailer: x-variant\r\n",
        "x-long: " + "x" * 4096 + "\r\n",
    ],
    ids=["close", "expect", "encoded", "twice", "token", "offer", "upgrade", "settings", "te", "trailer", "long"],
)
def test_unusual_heads_are_answered_on_the_short_way_too(live: Live, slow: list[str], head: str) -> None:
    for _ in range(2):
        client = Client(live)
        client.send(infer(headers=head))
        status, headers, _ = client.reply()
        assert status == 200
        assert ("connection" in headers) == ("close" in head)
        client.close()
    assert slow == []


def test_the_body_is_asked_for_where_the_client_waits_for_that(client: Client) -> None:
    head, _, body = infer(3, headers="expect: 100-continue\r\n").partition(b"\r\n\r\n")
    for _ in range(2):
        client.send(head + b"\r\n\r\n")
        assert client.file.readline() + client.file.readline() == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(body)
        assert client.pixels() == answer_to(3)


def test_a_body_above_the_limit_is_refused_every_time(live: Live) -> None:
    client = Client(live)
    for _ in range(2):
        status, _, body = client.ask(infer(name="x" * LIMIT))
        assert (status, json.loads(body)["code"]) == (413, "body_too_large")
    client.send(infer(2))
    assert client.pixels() == answer_to(2)
    client.close()


def test_a_chunked_body_takes_uvicorns_way_and_its_trailers_are_no_headers(client: Client, slow: list[str]) -> None:
    head, _, body = infer(2, path="/v2/models/pixels/infer", headers="x-variant: a\r\n").partition(b"\r\n\r\n")
    head = head.partition(b"content-length")[0] + b"transfer-encoding: chunked\r\n\r\n"
    for _ in range(2):
        client.send(head + b"%x\r\n%b\r\n0\r\nx-variant: poor\r\n\r\n" % (len(body), body))
        assert client.pixels() == answer_to(2)
    assert len(slow) == 2


async def _behaviour(self: Variant, *_: Any, **__: Any) -> Any:
    """What asyncio promises to a coroutine that a task runs."""
    before = SEEN.get()
    SEEN.set(before + 1)
    await asyncio.sleep(0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await asyncio.sleep(10)
    task = asyncio.current_task()
    raise BadInput(f"{before} {SEEN.get()} {task is not None and not task.cancelling()}")


def test_timeouts_context_and_sleep_work_on_every_request(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Variant, "predict", _behaviour)
    for _ in range(3):
        status, _, body = client.ask(infer())
        assert (status, json.loads(body)["error"]) == (400, "0 1 True")


@pytest.mark.parametrize("cut", [3, 60, -1], ids=["in the head", "behind a line", "in the body"])
def test_a_head_that_comes_in_pieces(client: Client, cut: int) -> None:
    request = infer(2)
    assert client.ask(infer())[0] == 200
    for _ in range(2):
        client.send(request[:cut])
        time.sleep(0.02)
        client.send(request[cut:])
        assert client.pixels() == answer_to(2)
        client.send(infer(3))
        assert client.pixels() == answer_to(3)


def test_head_and_body_apart(client: Client) -> None:
    head, _, body = infer(4).partition(b"\r\n\r\n")
    assert client.ask(infer())[0] == 200
    client.send(head + b"\r\n\r\n")
    time.sleep(0.02)
    client.send(body)
    assert client.pixels() == answer_to(4)


def test_requests_that_come_while_one_is_answered_wait_their_turn(live: Live, client: Client) -> None:
    held = [infer(pixel, path="/v2/models/pixels/versions/held/infer") for pixel in range(5)]
    client.send(held[0])
    assert client.pixels() == answer_to(0)
    live.gate.clear()
    try:
        for request in held[1:]:
            client.send(request)
            time.sleep(0.02)
        client.send(infer(5) + infer(6))
        time.sleep(0.02)
    finally:
        live.gate.set()
    assert [client.pixels() for _ in range(6)] == [answer_to(pixel) for pixel in range(1, 7)]
    client.send(infer(7))
    assert client.pixels() == answer_to(7)


def test_who_left_on_the_short_way_is_not_executed(live: Live, client: Client) -> None:
    path = "/v2/models/pixels/versions/held/infer"
    assert client.ask(infer(path=path))[0] == 200
    counted = live.fleet.metrics.variants["held"]
    counted.catch_up()
    ran, gone = counted.rows.total, counted.requests["client_gone"]
    live.gate.clear()
    try:
        client.send(infer(1, path=path))  # on the device
        time.sleep(0.05)
        for _ in range(3):
            leaver = Client(live)
            leaver.send(infer(2, path=path))
            time.sleep(0.05)
            leaver.close()
        time.sleep(0.05)
    finally:
        live.gate.set()
    assert client.pixels() == answer_to(1)
    _wait_for(lambda: gone.count == 3)
    counted.catch_up()
    assert counted.rows.total == ran + 1


def _wait_for(happened: Any) -> None:
    give_up = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_a_request_in_flight_at_the_end_of_the_server_is_answered_and_told_that_it_was_the_last() -> None:
    path = "/v2/models/pixels/versions/held/infer"
    with live_server() as server:
        client = Client(server)
        assert client.ask(infer(path=path))[0] == 200
        server.gate.clear()
        client.send(infer(1, path=path))
        time.sleep(0.05)
        server.server.should_exit = True
        time.sleep(0.3)
        server.gate.set()
        status, headers, _ = client.reply()
        assert (status, headers["connection"]) == (200, "close")
        assert client.is_closed()
        client.close()


def test_a_bug_on_the_short_way_is_confessed(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug")

    assert client.ask(infer())[0] == 200
    monkeypatch.setattr(Variant, "predict", fail)
    status, _, body = client.ask(infer())
    assert (status, json.loads(body)["code"]) == (500, "internal")


def test_a_large_body_comes_in_pieces(client: Client, slow: list[str]) -> None:
    for number in range(3):
        request = infer(number, name="image", filler="x" * 2000)
        client.send(request[:500])
        time.sleep(0.02)
        client.send(request[500:1500])
        time.sleep(0.02)
        client.send(request[1500:])
        assert client.pixels() == answer_to(number)
    assert slow == []


def test_what_follows_a_body_in_the_same_packet_is_the_next_request(client: Client) -> None:
    assert client.ask(infer())[0] == 200
    first, second, third = (infer(pixel) for pixel in (2, 3, 4))
    client.send(first[:-5])
    time.sleep(0.02)
    client.send(first[-5:] + second + third[:20])
    time.sleep(0.02)
    client.send(third[20:])
    assert [client.pixels() for _ in range(3)] == [answer_to(2), answer_to(3), answer_to(4)]


def test_who_leaves_while_sending_a_body_is_counted(live: Live, client: Client) -> None:
    gone = live.fleet.metrics.variants["a"].requests["client_gone"]
    before = gone.count
    assert client.ask(infer())[0] == 200
    leaver = Client(live)
    leaver.send(infer()[:-5])
    time.sleep(0.05)
    leaver.close()
    _wait_for(lambda: gone.count == before + 1)
