"""Bodies that ask for much (`bombs.py`): whoever sends them is answered, and nobody else waits, neither now nor later.

The quick ones are part of every run; all of them at their full size, and in floods, are `make soak`. What was measured
stands in `docs/measurements/bombs.md`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import httpx
import pytest

from bombs import (
    ARRAY_BOMBS,
    BOMBS,
    GRPC_HEAVY,
    GRPC_TOO_MANY,
    INFER,
    JSON,
    PREDICT,
    Bomb,
    empty_jpeg,
    field,
    form_of,
    png,
    predict_with,
)
from leanserve.api.v2.grpc_messages import SERVICE
from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.arrays import NPY, NPZ, ArrayCodec
from leanserve.contracts import ModelSpec, TensorSpec
from leanserve.errors import BadInput, BodyTooLarge
from loop_lag import STALL_MS, loop_lag
from raw_http import PendingResult, ask
from rule_service import RuleService, serving

QUICK = (
    "json: tiny lists",
    "json: deep and closed",
    "json: one huge number",
    "v2 json: floats",
    "base64: spaces",
    "png: 50,000,000 x 1",
    "png: 1 x 16,000",
    "jpeg: 631 bytes",
    "form: tiny parts",
    "gzip: 16 MB of lists",
)
MARGIN = 100e6
"""Bytes of the process that may be left while it still answers: one large body in each of its forms."""
MARGIN_AFTERWARDS = 32e6
"""And once there has been nothing to decode for 20 seconds."""
HONEST_S = 1.5
"""The longest wait of an honest client with a small image; on a machine of its own it is some 20 ms."""
TRIES = 3
HONEST = predict_with(png(64, 64), "image/png")


class Seen(NamedTuple):
    """What a bomb did."""

    status: int
    seconds: float
    lag_ms: float


def send(service: RuleService, bomb: Bomb) -> PendingResult:
    return asyncio.run(ask(service.port, bomb.request("rules")))


def set_off(service: RuleService, bomb: Bomb) -> Seen:
    """Send it while others ask; where others had the cores, once more."""
    seen = []
    for _ in range(TRIES):
        with loop_lag(service.port, service.process.pid) as lag:
            began = time.perf_counter()
            status = send(service, bomb).status
            seconds = time.perf_counter() - began
        seen.append(Seen(status, seconds, lag.worst_ms))
        if lag.worst_ms < STALL_MS:
            break
    return min(seen, key=lambda item: item.lag_ms)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RuleService]:
    with serving(tmp_path_factory.mktemp("bombs"), "rule") as service:
        assert send(service, HONEST).status == 200
        yield service


@pytest.mark.parametrize("name", QUICK)
def test_a_bomb_stops_nobody(service: RuleService, name: str) -> None:
    before, bomb = service.rss(), BOMBS[name]()
    seen = set_off(service, bomb)
    assert seen.status in {200, 400, 413, 429, 504}
    assert seen.lag_ms < STALL_MS
    assert service.rss() - before < MARGIN
    assert send(service, HONEST).status == 200


def call(service: RuleService, method: str, data: bytes) -> grpc.StatusCode:
    """Send this over gRPC, whatever it is."""
    with grpc.insecure_channel(f"127.0.0.1:{service.grpc_port}", [("grpc.max_send_message_length", -1)]) as channel:
        try:
            channel.unary_unary(f"/{SERVICE}/{method}")(data, timeout=30)
        except grpc.RpcError as error:
            code: grpc.StatusCode = error.code()
            return code
    return grpc.StatusCode.OK


GRPC_BOMBS = {**GRPC_HEAVY, **GRPC_TOO_MANY}


@pytest.mark.parametrize("method", ["ModelInfer", "RepositoryIndex"])
@pytest.mark.parametrize(
    "name",
    [name if name in {"tensors", "texts"} else pytest.param(name, marks=pytest.mark.soak) for name in GRPC_BOMBS],
)
def test_a_bomb_over_grpc_stops_nobody(service: RuleService, method: str, name: str) -> None:
    before, data, lags = service.rss(), GRPC_BOMBS[name](), []
    for _ in range(TRIES):
        with loop_lag(service.port, service.process.pid) as lag:
            began = time.perf_counter()
            code = call(service, method, data)
            seconds = time.perf_counter() - began
        lags.append(lag.worst_ms)
        if lag.worst_ms < STALL_MS:
            break
    sent, grown = len(data) / 1e6, (service.rss() - before) / 1e6
    print(f"| {method}: {name} | {sent:.2f} | {code.name} | {seconds:.2f} | {min(lags):.0f} | {grown:.0f} |")
    assert code in {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    }
    assert min(lags) < STALL_MS
    assert grown * 1e6 < MARGIN


def test_messages_that_are_refused_do_not_stay(service: RuleService) -> None:
    """gRPC keeps the error that ends a call, with the frames that it passed, until the garbage collector looks."""
    message = field(1, b"rules") + field(7, bytes(8_000_000))
    before = service.rss()
    for _ in range(30):
        assert call(service, "ModelInfer", message) is grpc.StatusCode.INVALID_ARGUMENT
    assert service.rss() - before < MARGIN


async def flood(service: RuleService, bomb: Bomb, count: int) -> tuple[list[int], float]:
    """So many at once, and in the midst of them an honest client: their statuses, and its seconds."""
    sent = [asyncio.create_task(ask(service.port, bomb.request("rules"))) for _ in range(count)]
    await asyncio.sleep(0.3)
    began = time.perf_counter()
    assert (await ask(service.port, HONEST.request("rules"))).status == 200
    seconds = time.perf_counter() - began
    for task in sent[1:]:
        task.cancel()  # they leave, and what waits for them is not decoded any more
    done = await asyncio.gather(*sent, return_exceptions=True)
    return [reply.status for reply in done if isinstance(reply, PendingResult)], seconds


@pytest.mark.parametrize("bomb", [predict_with(empty_jpeg(7000, 7000), "image/jpeg")], ids=["jpeg"])
def test_an_honest_client_waits_for_no_flood(service: RuleService, bomb: Bomb) -> None:
    statuses, seconds = asyncio.run(flood(service, bomb, 40))
    assert set(statuses) <= {200, 429, 504}
    assert seconds < HONEST_S


def least_lag_ms(service: RuleService, at_once: Callable[[], Coroutine[Any, Any, set[int]]], status: int) -> float:
    """The lag while all of them are answered so; where others had the cores, once more."""
    lags = []
    for _ in range(TRIES):
        with loop_lag(service.port, service.process.pid) as lag:
            assert asyncio.run(at_once()) == {status}
        lags.append(lag.worst_ms)
        if lag.worst_ms < STALL_MS:
            break
    return min(lags)


def test_hundreds_of_small_bodies_stop_nobody(service: RuleService) -> None:
    body = b'{"inputs":[' + b"[]," * 21_000 + b"[]]}"
    request = Bomb(INFER, JSON, body).request("rules")

    async def at_once() -> set[int]:
        return {reply.status for reply in await asyncio.gather(*(ask(service.port, request) for _ in range(300)))}

    assert least_lag_ms(service, at_once, 400) < STALL_MS


def test_hundreds_who_want_the_description_stop_nobody(service: RuleService) -> None:
    async def at_once() -> set[int]:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{service.port}", timeout=60) as client:
            replies = await asyncio.gather(*(client.get("/openapi.json") for _ in range(100)))
        return {reply.status_code for reply in replies}

    assert least_lag_ms(service, at_once, 200) < STALL_MS


FLAT = ModelSpec((TensorSpec("x", "float32", (4,)),), (TensorSpec("y", "float32", (4,)),))


@pytest.mark.parametrize("name", ARRAY_BOMBS)
def test_array_files_that_lie_are_refused_by_their_headers(name: str) -> None:
    codec, body = ArrayCodec(AnswerEncoder(FLAT)), ARRAY_BOMBS[name]()
    began = time.perf_counter()
    with pytest.raises((BadInput, BodyTooLarge)):
        codec.decode(NPZ if name.startswith("npz") else NPY, body)
    assert time.perf_counter() - began < 1.0


def _left_in_the_end(service: RuleService, before: int) -> int:
    """Bytes that are not given back; what is decoded by now may still take as long as a request may wait."""
    give_up = time.monotonic() + 45
    while (left := service.rss() - before) >= MARGIN_AFTERWARDS and time.monotonic() < give_up:
        time.sleep(1)
    return left


@pytest.mark.soak
@pytest.mark.parametrize("name", BOMBS)
def test_every_bomb_stops_nobody(service: RuleService, name: str) -> None:
    before, bomb = service.rss(), BOMBS[name]()
    seen = set_off(service, bomb)
    sent, grown = len(bomb.body) / 1e6, (service.rss() - before) / 1e6
    print(f"| {name} | {sent:.2f} | {seen.status} | {seen.seconds:.2f} | {seen.lag_ms:.0f} | {grown:.0f} |")
    assert seen.status in {200, 400, 413, 429, 504}
    assert seen.lag_ms < STALL_MS
    assert send(service, HONEST).status == 200


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "bomb",
    [
        predict_with(empty_jpeg(7000, 7000), "image/jpeg"),
        predict_with(png(50_000_000, 1), "image/png"),
        predict_with(png(7000, 7000), "image/png"),
        predict_with(form_of([png(1000, 1000, 4)] * 40), "multipart/form-data; boundary=x"),
        Bomb(PREDICT, JSON, b'{"inputs":[' + b"[0]," * 1_000_000 + b"[0]]}"),
    ],
    ids=["jpeg", "png sliver", "png", "form", "json"],
)
def test_floods_stop_nobody_and_leave_nothing_behind(tmp_path: Path, bomb: Bomb) -> None:
    with serving(tmp_path, "rule") as service:
        send(service, HONEST)
        before = service.rss()
        with loop_lag(service.port, service.process.pid) as lag:
            statuses, seconds = asyncio.run(flood(service, bomb, 100))
        print(f"honest {seconds * 1000:.0f} ms, lag {lag.worst_ms:.0f} ms, {len(statuses)} replies")
        left = _left_in_the_end(service, before)
        print(f"left {left / 1e6:.0f} MB")
        assert seconds < HONEST_S
        assert lag.worst_ms < STALL_MS
        assert left < MARGIN_AFTERWARDS
