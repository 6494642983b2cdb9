"""The short way of a connection against uvicorn's own: the same replies, and nothing taken that is unusual."""

from __future__ import annotations

import gzip
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fakes import Live, live_server
from leanserve.http.connection import Connection
from leanserve.http.heads import KnownHeads
from leanserve.serving.variant import Variant
from raw_client import Client

INFER = "/v2/models/pixels/versions/a/infer"
LIMIT = 4096
ROW = np.array([[[[0, 1], [2, 3]]]], np.float32)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server(limits={"body_bytes": LIMIT}) as server:
        yield server


@pytest.fixture
def parsed(live: Live, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What goes through uvicorn's parser, from a time on when no head is known."""
    connections: Any = live.server.config.http_protocol_class
    connections.heads = KnownHeads(connections.hot)
    seen: list[bytes] = []
    original = Connection._parse

    def spy(self: Connection, data: bytes) -> None:
        seen.append(data)
        original(self, data)

    monkeypatch.setattr(Connection, "_parse", spy)
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
        infer(path="/v1/predict", headers="content-type: image/png\r\n"),
    ],
    ids=["infer", "variant", "packed", "refused", "excluded", "unknown", "broken", "predict"],
)
def test_the_short_way_replies_as_uvicorns_does(client: Client, parsed: list[bytes], request_: bytes) -> None:
    first, second = client.ask(request_), client.ask(request_)
    assert parsed == [request_]
    if first[0] == 500:  # an id of its own
        assert first[0] == second[0]
        assert second[2].startswith(first[2][:30])
    else:
        assert without_times(second) == without_times(first)
    assert set(first[1]) == set(second[1])


def test_a_known_head_with_another_body_has_the_other_answer(client: Client, parsed: list[bytes]) -> None:
    for pixel in range(5):
        client.send(infer(pixel))
        assert client.pixels() == answer_to(pixel)
    assert len(parsed) == 1


def test_heads_are_known_on_all_connections(live: Live, client: Client, parsed: list[bytes]) -> None:
    request = infer(headers="x-shared: 1\r\n")
    client.ask(request)
    other = Client(live)
    assert other.ask(request)[0] == 200
    other.close()
    assert len(parsed) == 1


def test_requests_on_the_short_way_are_counted_like_others(live: Live, client: Client) -> None:
    counted = live.fleet.metrics.variants["a"].requests["ok"]
    before = counted.count
    for _ in range(5):
        client.ask(infer())
    assert counted.count == before + 5


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("connection: close\r\n", 200),
        ("expect: 100-continue\r\n", 200),
        ("content-encoding: identity\r\n", 200),
        ("x-variant: a\r\nX-Variant: a\r\n", 200),
        ("connection: upgrade\r\n", 200),
        ("upgrade: h2c\r\n", 200),
        ("connection: upgrade\r\nupgrade: h2c\r\n", 200),
        ("http2-settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n", 200),
        ("te: trailers\r\n", 200),
        ("trailer: x-variant\r\n", 200),
        (f"x-long: {'x' * 4096}\r\n", 200),
    ],
    ids=["close", "expect", "encoded", "twice", "token", "offer", "upgrade", "settings", "te", "trailer", "long"],
)
def test_what_is_out_of_the_ordinary_is_parsed_every_time(
    live: Live, parsed: list[bytes], head: str, status: int
) -> None:
    for _ in range(2):
        client = Client(live)
        client.send(infer(headers=head))
        if "expect" in head:
            assert client.file.readline() + client.file.readline() == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert client.reply()[0] == status
        client.close()
    assert len(parsed) == 2


def test_a_body_above_the_limit_is_refused_every_time(live: Live, parsed: list[bytes]) -> None:
    for _ in range(2):
        client = Client(live)
        status, _, body = client.ask(infer(name="x" * LIMIT))
        assert (status, json.loads(body)["code"]) == (413, "body_too_large")
        client.close()
    assert len(parsed) == 2


@pytest.mark.parametrize("cut", [3, 60, -1], ids=["in the head", "behind a line", "in the body"])
def test_a_known_head_that_comes_in_pieces(client: Client, cut: int) -> None:
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


def test_a_large_body_comes_in_pieces_and_its_head_is_known_all_the_same(client: Client, parsed: list[bytes]) -> None:
    for number in range(3):
        request = infer(number, name="image", filler="x" * 2000)
        client.send(request[:500])
        time.sleep(0.02)
        client.send(request[500:1500])
        time.sleep(0.02)
        client.send(request[1500:])
        assert client.pixels() == answer_to(number)
    assert b"".join(parsed) == infer(0, name="image", filler="x" * 2000)


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
