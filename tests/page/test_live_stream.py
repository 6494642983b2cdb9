"""Server-sent events of the live numbers: one snapshot for all who listen, none for nobody, and an end."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing

import httpx
import pytest

from fakes import live_server
from leanserve.api.access import Key
from leanserve.api.live_stream import MOST_LISTENERS, LiveStream
from leanserve.errors import RateLimited


class Source:
    """Snapshots that are numbered."""

    def __init__(self) -> None:
        self.made = 0
        self.over = False

    def stream(self) -> LiveStream:
        return LiveStream(self.snapshot, lambda: self.over, period_s=0.001)

    def snapshot(self) -> dict[str, int]:
        self.made += 1
        return {"number": self.made}


async def heard(events: AsyncIterator[bytes], most: int) -> list[int]:
    numbers = []
    async with aclosing(events) as open_events:  # type: ignore[type-var]
        async for event in open_events:
            text = event.decode()
            assert text.startswith("data: ")
            assert text.endswith("\n\n")
            numbers.append(json.loads(text[6:])["number"])
            if len(numbers) == most:
                break
    return numbers


def run(scene: Callable[[Source, LiveStream], Awaitable[None]]) -> None:
    async def body() -> None:
        source = Source()
        await asyncio.wait_for(scene(source, source.stream()), 10)

    asyncio.run(body())


def test_all_who_listen_share_one_snapshot() -> None:
    async def scene(source: Source, stream: LiveStream) -> None:
        told = await asyncio.gather(*(heard(stream.listen(), 5) for _ in range(8)))
        assert told == [[1, 2, 3, 4, 5]] * 8
        assert source.made <= 6

    run(scene)


def test_nothing_is_made_while_nobody_listens() -> None:
    async def scene(source: Source, stream: LiveStream) -> None:
        await asyncio.sleep(0.01)
        assert source.made == 0
        await heard(stream.listen(), 2)
        assert stream.listeners == 0
        await asyncio.sleep(0.01)
        made = source.made
        await asyncio.sleep(0.01)
        assert source.made == made
        assert await heard(stream.listen(), 1) == [made + 1], "who comes later wakes it again"

    run(scene)


def test_it_ends_for_all_when_the_service_drains() -> None:
    async def scene(source: Source, stream: LiveStream) -> None:
        listening = [asyncio.create_task(heard(stream.listen(), 10**6)) for _ in range(3)]
        await asyncio.sleep(0.01)
        source.over = True
        assert all(await asyncio.gather(*listening))
        assert await heard(stream.listen(), 1) == [], "later ones at once"

    run(scene)


def test_listeners_are_bounded_and_make_room_when_they_leave() -> None:
    async def scene(source: Source, stream: LiveStream) -> None:
        listening = [stream.listen() for _ in range(MOST_LISTENERS)]
        await asyncio.gather(*(anext(events) for events in listening))
        with pytest.raises(RateLimited, match="clients listen already") as refused:
            stream.listen()
        assert refused.value.retry_after_s == 10
        await listening[0].aclose()  # type: ignore[attr-defined]
        assert await heard(stream.listen(), 1)
        for events in listening[1:]:
            await events.aclose()  # type: ignore[attr-defined]

    run(scene)


def test_over_http_it_asks_for_the_role_and_ends_with_the_service() -> None:
    keys = [Key("looker", hashlib.sha256(b"x").digest(), frozenset({"read"}))]
    bearer = {"authorization": "Bearer x"}
    with live_server(keys=keys) as live, httpx.Client(base_url=f"http://{live.http}") as http:
        assert http.get("/v1/live/stream").status_code == 401
        assert http.get("/").status_code == 200, "the page itself is for everybody"
        with http.stream("GET", "/v1/live/stream", headers=bearer) as reply:
            assert reply.headers["content-type"].startswith("text/event-stream")
            assert reply.headers["cache-control"] == "no-store"
            lines = (line for line in reply.iter_lines() if line)
            told = json.loads(next(lines).removeprefix("data: "))
            assert [variant["name"] for variant in told["variants"]] == ["a", "b", "broken", "held", "poor"]
            live.fleet.draining = True
            assert list(lines) == []
