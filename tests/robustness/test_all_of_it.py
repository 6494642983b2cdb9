"""Bombs, floods, slow clients and clients that leave, all of it for minutes: the process stays as it was.

`LEANSERVE_SOAK_S` says for how many seconds; 600 by default. What it prints is in docs/measurements/soak.md.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from grpc import aio

from bombs import BOMBS, PREDICT, predict_with
from leanserve.api.v2.grpc_messages import SERVICE, message
from raw_http import ask, connected, infer_request, post, read_reply
from rule_service import RuleService, needs_proc, serving
from rules import row

SECONDS = float(os.environ.get("LEANSERVE_SOAK_S", "600"))
WINDOWS = 5
"""Of so many parts of the time the least is looked at: above it is what was just being answered."""
SETTLED = 1
"""After so many of them every buffer, thread and cache has been needed once."""
REST_S = 25.0
"""Between two rounds of bombs: what they leave is given back when nothing large was decoded for 20 seconds."""
MOST_MB_PER_MINUTE = 1.0
GONE = (OSError, asyncio.IncompleteReadError, TimeoutError)
"""How the server ends what it does not want to hear to the end."""


class Sample(NamedTuple):
    """What the process had at one moment."""

    rss_mb: float
    descriptors: int
    threads: int


def sample(service: RuleService) -> Sample:
    threads = len(list(Path(f"/proc/{service.process.pid}/task").iterdir()))
    return Sample(service.rss() / 1e6, service.descriptors(), threads)


class Crowd:
    """All clients, each again and again until the time is up; what became of the honest ones is counted."""

    def __init__(self, service: RuleService) -> None:
        self.service = service
        self.statuses: Counter[int] = Counter()
        self.bombs: Counter[int] = Counter()
        self._names = iter(BOMBS)
        self._drawn = random.Random(7)

    async def honest(self) -> None:
        async with connected(self.service.port) as (reader, writer):
            for _ in range(50):
                number = self._drawn.randrange(1, 9)
                writer.write(infer_request("rule", row(number)))
                reply = await asyncio.wait_for(read_reply(reader), 30)
                self.statuses[reply.status] += 1
                assert reply.status != 200 or reply.outputs()[0] == 10 * number
                await asyncio.sleep(0.02)

    async def bomb(self) -> None:
        name = next(self._names, None)
        if name is None:
            self._names = iter(BOMBS)
            await asyncio.sleep(REST_S)
            return
        made = await asyncio.to_thread(BOMBS[name])
        self.bombs[(await ask(self.service.port, made.request("rules"))).status] += 1
        await asyncio.sleep(0.5)

    async def burst(self) -> None:
        """More at once than the queue takes, half of whom leave before they are answered."""
        sent = [asyncio.create_task(ask(self.service.port, infer_request("rule", row(1)))) for _ in range(200)]
        await asyncio.sleep(0.02)
        for task in sent[::2]:
            task.cancel()
        await asyncio.gather(*sent, return_exceptions=True)
        await asyncio.sleep(2)

    async def trickle(self) -> None:
        """One byte at a time, until the server has enough of it or for 15 seconds."""
        begun = self._drawn.choice([b"GET /heal", post(PREDICT, bytes(100_000))[:2000], b"POST / HTTP/1.1\r\nx: "])
        async with connected(self.service.port) as (_, writer):
            writer.write(begun)
            for _ in range(15):
                await asyncio.sleep(1)
                writer.write(b"a")

    async def half(self) -> None:
        """A part of a large body, or of its head; then nobody is there any more."""
        whole = predict_with(b" " * 2_000_000).request("rules")
        async with connected(self.service.port) as (_, writer):
            writer.write(whole[: self._drawn.randrange(len(whole))])
            await asyncio.sleep(0.05)
            writer.transport.abort()
        await asyncio.sleep(0.2)

    async def wrong(self) -> None:
        """What is refused by its head."""
        head = self._drawn.choice([b"\0" * 100, b"GET /" + b"a" * 100_000, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 1000])
        async with connected(self.service.port) as (reader, writer):
            writer.write(head + b"\r\n\r\n")
            await asyncio.wait_for(reader.read(), 10)
        await asyncio.sleep(0.1)

    async def over_grpc(self) -> None:
        """Honest calls, cancelled ones, and messages that are none, on a channel of their own."""
        asked = message("ModelInferRequest")(model_name="rules", model_version="rule")
        asked.inputs.add(name="x", datatype="FP32", shape=list(row(2).shape))
        asked.raw_input_contents.append(row(2).tobytes())
        async with aio.insecure_channel(f"127.0.0.1:{self.service.grpc_port}") as channel:
            infer = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            for _ in range(20):
                await infer(asked.SerializeToString(), timeout=30)
                infer(asked.SerializeToString(), timeout=30).cancel()
                with suppress(aio.AioRpcError):
                    await infer(b"\x2a\x00" * 20_000, timeout=30)
                await asyncio.sleep(0.05)

    async def looker(self) -> None:
        for path in ("/metrics", "/v1/variants", "/", "/openapi.json", "/nothing"):
            await ask(self.service.port, f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        await asyncio.sleep(1)

    @property
    def all(self) -> Sequence[Callable[[], Awaitable[None]]]:
        slow = [self.trickle] * 10
        return (
            self.honest,
            self.honest,
            self.bomb,
            self.burst,
            self.half,
            self.wrong,
            self.over_grpc,
            self.looker,
            *slow,
        )


async def again_and_again(client: Callable[[], Awaitable[None]], until_: float) -> None:
    loop = asyncio.get_running_loop()
    while loop.time() < until_:
        with suppress(*GONE):
            await client()


async def run(crowd: Crowd, seconds: float) -> list[Sample]:
    """What was seen, once a second."""
    end = asyncio.get_running_loop().time() + seconds
    samples = []
    async with asyncio.TaskGroup() as clients:
        running = [clients.create_task(again_and_again(client, end)) for client in crowd.all]
        while not all(task.done() for task in running):
            samples.append(sample(crowd.service))
            await asyncio.sleep(1)
    return samples


def lowest(samples: Sequence[Sample]) -> list[Sample]:
    """The least of each window."""
    starts = np.linspace(0, len(samples), WINDOWS + 1).astype(int)
    windows = [samples[start:end] for start, end in itertools.pairwise(starts)]
    return [Sample(*(min(numbers) for numbers in zip(*window, strict=True))) for window in windows]


def mb_per_minute(windows: Sequence[Sample], seconds: float) -> float:
    """The slope of the line through the windows."""
    minutes = np.arange(len(windows)) * seconds / 60 / WINDOWS
    return float(np.polyfit(minutes, [window.rss_mb for window in windows], 1)[0])


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 600)
@needs_proc
def test_all_of_it_for_minutes_leaves_nothing_behind(tmp_path: Path) -> None:
    with serving(tmp_path, "rule") as service:
        crowd = Crowd(service)
        samples = asyncio.run(run(crowd, SECONDS))
        windows = lowest(samples)
        for index, window in enumerate(windows):
            minute = index * SECONDS / 60 / WINDOWS
            print(f"| {minute:.1f} | {window.rss_mb:.0f} | {window.descriptors} | {window.threads} |")
        settled = windows[SETTLED:]
        slope = mb_per_minute(settled, SECONDS)
        print(f"{slope:+.2f} MB a minute; honest {dict(crowd.statuses)}, bombs {dict(crowd.bombs)}")
        assert set(crowd.statuses) <= {200, 429, 503}
        assert crowd.statuses[200] > 0.9 * crowd.statuses.total()
        assert slope <= MOST_MB_PER_MINUTE
        assert settled[-1].descriptors <= settled[0].descriptors + 4
        assert settled[-1].threads <= settled[0].threads + 1
    assert "Traceback" not in (tmp_path / "log").read_text()
