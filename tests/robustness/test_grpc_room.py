"""All messages over gRPC together are bounded in memory, and who stalls keeps nobody out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import grpc
import pytest

from fakes import Live, live_server
from leanserve.api.v2.grpc_messages import SERVICE, message
from leanserve.api.v2.grpc_room import MessageRoom
from raw_http2 import DATA, HEADERS, StallingCall

EACH, ROOM = 2**20, 4 * 2**20
INFER = f"/{SERVICE}/ModelInfer"
Request = message("ModelInferRequest")


@pytest.fixture
def live() -> Iterator[Live]:
    limits = {"body_bytes": EACH, "buffered_bytes": ROOM, "body_s": 2}
    with live_server(limits=limits, drain={"timeout_s": 4}) as server:
        yield server


def room(live: Live) -> MessageRoom:
    grpc_server = live.server._grpc  # type: ignore[attr-defined]
    assert isinstance(grpc_server.room, MessageRoom)
    return grpc_server.room


def stalling(live: Live, count: int) -> list[StallingCall]:
    port = int(live.grpc.rpartition(":")[2])
    return [StallingCall(port, INFER.encode(), EACH - 100, EACH - 500) for _ in range(count)]


def go_on(calls: Sequence[StallingCall], seconds: float) -> int:
    """How many have not ended after that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for call in calls:
            call.go_on()
        time.sleep(0.01)
    return sum(not call.is_ended for call in calls)


def ask(live: Live, size: int = 0) -> Any:
    made = Request(model_name="pixels", model_version="a", id="7" * size)
    made.inputs.add(name="image", datatype="FP32", shape=[1, 1, 2, 2], contents={"fp32_contents": [0, 1, 2, 3]})
    with grpc.insecure_channel(live.grpc) as channel:
        call = channel.unary_unary(INFER, Request.SerializeToString, message("ModelInferResponse").FromString)
        return call(made, timeout=10)


def test_calls_that_stall_have_no_more_than_the_room_and_lock_nobody_out(live: Live) -> None:
    calls = stalling(live, 10)
    left = go_on(calls, 0.5)
    assert 4 <= left < 10, "those that came first made room for others, until nobody waited"
    assert room(live).held <= ROOM
    began = time.monotonic()
    for size in (1, 500_000):
        assert len(ask(live, size).id) == size
    assert time.monotonic() - began < 1.0
    assert go_on(calls, 2.5) == 0, "limits.body_s"
    for call in calls:
        call.close()
    assert room(live).held == 0


def test_a_large_message_keeps_its_room_until_it_is_answered(live: Live) -> None:
    live.gate.clear()
    held = Request(model_name="pixels", model_version="held", id="7" * 900_000)
    held.inputs.add(name="image", datatype="FP32", shape=[1, 1, 2, 2], contents={"fp32_contents": [0, 1, 2, 3]})
    with grpc.insecure_channel(live.grpc) as channel:
        call = channel.unary_unary(INFER, Request.SerializeToString, message("ModelInferResponse").FromString)
        open_calls = [call.future(held, timeout=20) for _ in range(4)]
        with pytest.raises(grpc.RpcError) as refused:
            ask(live)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "limits.buffered_bytes" in refused.value.details()
        assert dict(refused.value.trailing_metadata())["retry-after"] == "1"
        live.gate.set()
        for open_call in open_calls:
            open_call.result()
    assert ask(live)
    assert room(live).held == 0


class Unread(StallingCall):
    """A call whose client takes in no more of the reply than comes unasked, 64 KiB."""

    began = False

    def _take(self, kind: int, flags: int, stream: int, content: bytes) -> None:
        if stream == 1 and kind in {DATA, HEADERS}:
            self.began = True
        else:
            super()._take(kind, flags, stream, content)


def test_replies_that_nobody_reads_are_bounded() -> None:
    with live_server(limits={"unread_bytes": 2_000_000}) as live:
        made = Request(model_name="pixels", model_version="a", id="7" * 900_000)
        made.inputs.add(name="image", datatype="FP32", shape=[1, 1, 2, 2], contents={"fp32_contents": [0, 1, 2, 3]})
        sent, port = made.SerializeToString(), int(live.grpc.rpartition(":")[2])
        calls = [Unread(port, INFER.encode(), len(sent), sent) for _ in range(2)]
        go_on(calls, 0.5)
        assert all(call.began for call in calls)
        with pytest.raises(grpc.RpcError) as refused:
            ask(live, 900_000)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "limits.unread_bytes" in refused.value.details()
        assert len(ask(live, 1000).id) == 1000
        calls.pop().close()
        give_up = time.monotonic() + 5
        while room(live).unread > 1_000_000:
            assert time.monotonic() < give_up
            time.sleep(0.01)
        assert len(ask(live, 900_000).id) == 900_000
        calls.pop().close()


def test_messages_that_stall_do_not_hold_up_the_end() -> None:
    with (
        live_server(limits={"body_bytes": EACH}, drain={"timeout_s": 4}) as live,
        closing(stalling(live, 1)[0]) as call,
    ):
        assert go_on([call], 0.2) == 1
        live.server.should_exit = True
        began = time.monotonic()
        assert go_on([call], 0.2) == 1
        while not call.is_ended:
            call.go_on()
            time.sleep(0.01)
        assert time.monotonic() - began < 3.5
