"""Bodies of hundreds of kilobytes, which are read in place: the right answers, and nothing else changed by it."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fakes import Live, live_server
from leanserve.errors import QueueFull
from leanserve.http import connection
from leanserve.http.body_reader import LARGE, BodyReader
from leanserve.http.connection import Connection
from leanserve.http.exchange import Exchange
from leanserve.serving.variant import Variant
from raw_client import Client

INFER = "/v2/models/pixels/versions/a/infer"
LIMIT = 16 * 2**20
SIZES = (LARGE - 1000, LARGE + 5000, 900_000)
"""The loop reads at most 256 KiB at a time: only of the last is a large rest to come."""


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server(limits={"body_bytes": LIMIT}) as server:
        yield server


@pytest.fixture
def client(live: Live) -> Iterator[Client]:
    made = Client(live)
    yield made
    made.close()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the bodies that are read in place."""
    sizes: list[int] = []

    class Watched(BodyReader):
        def read(self, begun: bytes, length: int, came: Callable[[memoryview], None]) -> None:
            sizes.append(length)
            super().read(begun, length, came)

    monkeypatch.setattr(connection, "BodyReader", Watched)
    return sizes


def infer(pixel: int, filler: int, form: str = "json", **keys: object) -> bytes:
    """A request with so many bytes that mean nothing; its head is the same for all pixels from 0 to 9."""
    row = np.full((1, 1, 2, 2), pixel, np.float32)
    tensor: dict[str, object] = {"name": "image", "shape": [1, 1, 2, 2], "datatype": "FP32", "filler": "x" * filler}
    if form == "json":
        body = json.dumps({"inputs": [tensor | {"data": row.ravel().tolist()}], **keys}).encode()
        headers = ""
    else:
        document = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": row.nbytes}}], **keys}).encode()
        body = document + row.tobytes()
        headers = f"inference-header-content-length: {len(document)}\r\n"
    head = f"POST {INFER} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def full(*_: object) -> None:
    """A variant that takes nobody."""
    raise QueueFull("full", retry_after_s=1)


@pytest.mark.parametrize("form", ["json", "binary"])
@pytest.mark.parametrize("size", SIZES)
def test_large_bodies_have_their_own_answers(client: Client, read: list[int], size: int, form: str) -> None:
    for pixel in range(4):
        client.send(infer(pixel, size, form))
        assert client.pixels() == [10.0 * pixel] * 4
    assert len(read) == (4 if size == SIZES[-1] else 0), "where the rest is large"


def test_what_comes_before_a_body_is_read_in_place_and_waits_for_its_turn_is_part_of_it(
    client: Client, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was taken for the head of another request, where much had to be parsed in that turn of the loop."""
    take, read_in_place = Connection._take, Connection._read_in_place
    held: list[int] = []

    def begin_later(self: Connection, exchange: Exchange) -> None:
        self.transport.resume_reading()

    def take_in_a_full_turn(self: Connection, data: bytes) -> None:
        exchange = self._arriving
        if exchange is None or not exchange.started:
            take(self, data)
            return
        self.all.parsing.took(2**40)
        take(self, data)
        held.append(len(self._rest))
        read_in_place(self, exchange)

    monkeypatch.setattr(Connection, "_read_in_place", begin_later)
    monkeypatch.setattr(Connection, "_take", take_in_a_full_turn)
    for pixel in range(3):
        request = infer(pixel, SIZES[-1], "binary")
        client.send(request[:20_000])
        time.sleep(0.02)
        client.send(request[20_000:])
        assert client.pixels() == [10.0 * pixel] * 4
    assert held
    assert all(held)
    assert read


def test_after_a_large_body_the_connection_takes_whatever_comes(client: Client, read: list[int]) -> None:
    health = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n"
    small = infer(3, 100)
    head, _, body = small.partition(b"\r\n\r\n")
    chunked = head.partition(b"content-length")[0] + b"transfer-encoding: chunked\r\n\r\n"
    chunked += b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    for _ in range(2):
        client.send(infer(1, 900_000))
        assert client.pixels() == [10.0] * 4
    assert client.ask(health)[0] == 200
    for request, pieces in ((small, 1), (small, 3), (chunked, 1), (infer(3, 40_000), 1), (infer(3, 40_000), 3)):
        size = -(-len(request) // pieces)
        for start in range(0, len(request), size):
            client.send(request[start : start + size])
            time.sleep(0.01)
        assert client.pixels() == [30.0] * 4
    client.send(health + infer(4, 900_000) + small + health)
    assert client.reply()[0] == 200
    assert [client.pixels()[0] for _ in range(2)] == [40.0, 30.0]
    assert client.reply()[0] == 200
    assert read[0] == len(infer(1, 900_000).partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize("cut", [80, 200, 5000, -1])
def test_a_large_body_in_pieces_and_the_next_request_behind_it(client: Client, read: list[int], cut: int) -> None:
    assert client.ask(infer(0, 300_000))[0] == 200
    first, second, third = (infer(pixel, size) for pixel, size in ((1, 300_000), (2, 300_000), (3, 10)))
    for piece in (first[:cut], first[cut:] + second[:cut], second[cut:] + third):
        client.send(piece)
        time.sleep(0.02)
    assert [client.pixels()[0] for _ in range(3)] == [10.0, 20.0, 30.0]
    assert read or cut not in {200, 5000}, "the head came whole, and not the body"


def test_a_body_that_nobody_wants_is_read_past(
    live: Live, client: Client, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        client.send(infer(1, 900_000))
        assert client.pixels() == [10.0] * 4
    kept = len(read)
    with monkeypatch.context() as patched:
        patched.setattr(Variant, "check_open", full)
        for _ in range(3):
            unwanted = infer(2, 900_000)
            client.send(unwanted[:500_000])
            status, headers, body = client.reply()
            assert (status, headers["retry-after"], json.loads(body)["code"]) == (429, "1", "queue_full")
            client.send(unwanted[500_000:])
        client.send(infer(2, 900_000)[:500_000])
        assert client.reply()[0] == 429
        leaver = Client(live)
        leaver.send(infer(2, 900_000)[:500_000])
        assert leaver.reply()[0] == 429
        leaver.close()
    assert len(read) == kept > 0
    client.send(infer(2, 900_000)[500_000:] + infer(3, 900_000) + infer(4, 10))
    assert [client.pixels()[0] for _ in range(2)] == [30.0, 40.0]


def test_what_nobody_wants_is_thrown_away_where_it_is(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop hears of it, and reads next to nothing of it."""
    pieces: list[int] = []

    class Watched(BodyReader):
        def buffer_updated(self, nbytes: int) -> None:
            pieces.append(nbytes)
            super().buffer_updated(nbytes)

    monkeypatch.setattr(connection, "BodyReader", Watched)
    for _ in range(2):
        client.ask(infer(1, 900_000))
    assert sum(pieces) > 800_000
    pieces.clear()
    monkeypatch.setattr(Variant, "check_open", full)
    for _ in range(3):
        assert client.ask(infer(1, 900_000))[0] == 429
    assert client.ask(b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 200
    assert sum(pieces) < 300_000


@pytest.mark.skipif(sys.platform != "linux", reason="how Linux makes room")
def test_the_kernel_has_room_for_a_large_body_from_the_first_one_on(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    transports: list[asyncio.Transport] = []

    class Watched(BodyReader):
        def __init__(self, connection: Connection, transport: asyncio.Transport, length: int) -> None:
            transports.append(transport)
            super().__init__(connection, transport, length)

    monkeypatch.setattr(connection, "BodyReader", Watched)
    for _ in range(2):
        client.ask(infer(1, 900_000))
    (transport,) = transports
    here = transport.get_extra_info("socket")
    assert here.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) > 2 * 900_000
    assert here.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1, "or small requests would never be heard"


@pytest.mark.parametrize("path", ["/v1/predict", INFER], ids=["predict", "infer"])
def test_what_could_not_be_taken_anyway_is_not_decoded(
    client: Client, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nonsense = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n".encode() + b"x" * 100_000
    assert client.ask(nonsense)[0] in {400, 415}
    monkeypatch.setattr(Variant, "check_open", full)
    assert client.ask(nonsense)[0] == 429
    assert client.ask(nonsense)[0] == 429


@pytest.mark.parametrize(("closed", "lines"), [(True, [b"HTTP/1.1 429"]), (False, [b"HTTP/1.1 100", b"HTTP/1.1 200"])])
def test_a_client_that_asks_first_is_told_before_it_sends_its_body(
    client: Client, monkeypatch: pytest.MonkeyPatch, lines: list[bytes], *, closed: bool
) -> None:
    if closed:
        monkeypatch.setattr(Variant, "check_open", full)
    head, _, body = infer(1, 10).partition(b"\r\n\r\n")
    client.send(head + b"\r\nexpect: 100-continue\r\n\r\n")
    assert client.file.readline().startswith(lines[0])
    if not closed:
        assert client.file.readline() == b"\r\n"
        client.send(body)
        assert client.file.readline().startswith(lines[1])


@pytest.mark.parametrize(
    ("parameters", "status"), [({}, 429), ({"priority": 1}, 200), ({"priority": 1, "timeout": 1}, 429)]
)
def test_the_place_in_the_queue_is_asked_for_before_the_body_is_here(
    live: Live, client: Client, monkeypatch: pytest.MonkeyPatch, parameters: dict[str, int], status: int
) -> None:
    """The default level waits too long, the most urgent one does not."""
    request = infer(1, 10, "binary", parameters=parameters)
    client.ask(request)
    monkeypatch.setattr(Variant, "wait_s", lambda _, level, *__: 0.001 if level == 1 else 1e6)
    client.send(request[:-1])
    if status == 200:
        client.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.socket.recv(1, socket.MSG_PEEK)
        client.socket.settimeout(10)
        client.send(request[-1:])
    assert client.reply()[0] == status


def test_any_route_takes_a_body_that_was_read_in_place(client: Client, read: list[int]) -> None:
    image = f"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ncontent-length: {900_000}\r\n\r\n"
    replies = [client.ask(image.encode() + b"x" * 900_000) for _ in range(2)]
    assert [status for status, _, _ in replies] == [400, 400], "no image, but read whole"
    assert read == [900_000] * 2


def test_who_leaves_amid_a_large_body_is_counted_and_disturbs_nobody(live: Live, client: Client) -> None:
    gone = live.fleet.metrics.variants["a"].requests["client_gone"]
    before = gone.count
    assert client.ask(infer(0, 300_000))[0] == 200
    leaver = Client(live)
    leaver.send(infer(1, 300_000)[:100_000])
    time.sleep(0.05)
    leaver.close()
    deadline = time.monotonic() + 5
    while gone.count == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gone.count == before + 1
    client.send(infer(2, 300_000))
    assert client.pixels() == [20.0] * 4


def test_a_client_that_closes_its_half_amid_a_large_body_is_let_go(live: Live, client: Client) -> None:
    assert client.ask(infer(0, 300_000))[0] == 200
    half = Client(live)
    half.send(infer(1, 300_000)[:100_000])
    half.socket.shutdown(socket.SHUT_WR)
    assert half.is_closed()
    half.close()


def test_bodies_that_are_only_announced_take_no_memory(live: Live, client: Client, read: list[int]) -> None:
    request = infer(0, LIMIT - 300)
    assert client.ask(request)[0] == 200
    read.clear()
    before = _resident()
    announcing = [Client(live) for _ in range(32)]
    for each in announcing:
        each.send(request[:5000])
    deadline = time.monotonic() + 5
    while len(read) < len(announcing) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(read) == len(announcing)
    assert _resident() - before < 4 * LIMIT, "half a gigabyte was announced"
    for each in announcing:
        each.close()


def test_a_body_is_not_kept_for_as_long_as_its_client_stays(live: Live, client: Client, read: list[int]) -> None:
    request = infer(1, LIMIT - 300)
    assert client.ask(request)[0] == 200
    staying = [Client(live) for _ in range(12)]
    before = _resident()
    assert [each.ask(request)[0] for each in staying] == [200] * len(staying)
    assert len(read) >= len(staying)
    assert _resident() - before < 4 * LIMIT
    for each in staying:
        each.close()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
