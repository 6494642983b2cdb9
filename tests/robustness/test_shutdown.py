""" "Shutdowns lose requests": 64 kept connections and gRPC at saturation, and clients that hold up the end."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from raw_http import connected, infer_request, read_reply
from rule_service import RuleService, serving
from rules import row
from shutdowns import DRAIN, end

SHUTDOWNS = 50


@pytest.mark.parametrize("by", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.soak)])
def test_a_shutdown_at_saturation_loses_nothing(tmp_path: Path, by: signal.Signals) -> None:
    with serving(tmp_path, "rule", drain=DRAIN) as service:
        tally = asyncio.run(end(service, by))
    assert tally.lost == []
    assert tally.http > 100
    assert tally.rpc > 10
    assert tally.last > 64
    assert tally.seconds < 8
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_fifty_shutdowns_lose_nothing(tmp_path: Path) -> None:
    for number in range(SHUTDOWNS):
        by = (signal.SIGTERM, signal.SIGINT)[number % 2]
        with serving(tmp_path / str(number), "rule", drain=DRAIN) as service:
            assert asyncio.run(end(service, by)).lost == []


def test_slow_bodies_do_not_hold_up_the_end_and_idle_connections_are_closed(tmp_path: Path) -> None:
    request = infer_request("rule", row(3))

    async def dribble(writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            writer.write(b" ")
            await asyncio.sleep(0.05)

    async def scenario(service: RuleService) -> None:
        async with asyncio.timeout(20), AsyncExitStack() as stack:
            slow, idle, late, bare = [await stack.enter_async_context(connected(service.port)) for _ in range(4)]
            idle[1].write(request)
            assert "connection" not in (await read_reply(idle[0])).headers
            slow[1].write(request.replace(b"content-length: ", b"content-length: 9"))
            late[1].write(request[:-1])
            bare[1].write(b"GET /readyz HTTP/1.1\r\nhost: x\r\n")
            dribbling = asyncio.create_task(dribble(slow[1]))
            await asyncio.sleep(0.2)
            service.process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            await asyncio.sleep(0.7)  # the delay is over, and no new connection is taken
            for (_, writer), rest in ((late, request[-1:]), (bare, b"\r\n")):
                writer.write(rest)
            for (reader, _), status in ((late, 200), (bare, 503), (slow, 503)):
                reply = await read_reply(reader)
                assert (reply.status, reply.headers["connection"]) == (status, "close")
            assert await idle[0].read() == b""
            dribbling.cancel()
        assert await asyncio.to_thread(service.process.wait, 10) == 0
        assert time.monotonic() - began < 3  # and not at the last moment

    with serving(tmp_path, "rule", drain={"delay_s": 0.5, "timeout_s": 3}) as service:
        asyncio.run(scenario(service))
