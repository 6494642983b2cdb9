""" "Unload and reload leak, reload spikes latency": a hundred cycles while a neighbour is under constant load."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from raw_http import ask, connected, infer_request, post, read_reply
from rule_service import RuleService, needs_proc, serving
from rules import row

CYCLES, WINDOW = 100, 20
CLIENTS, EVERY_S = 4, 0.02
PAUSE_S = 0.015
"""After every swap, so that what is steady is measured within the same tenths of a second."""
LEAKED_BYTES = 5 * 2**20
"""Most growth between the cycles 20-40 and 80-100. One session that is not freed has 17 MB of weights alone."""
MAX_LATENCY_RATIO = 5.0
"""0.9 to 1.3 where the cores belong to the test, 2 to 3 beside six busy processes, and 8 there if a lane loads."""
TENSOR = {"name": "x", "shape": [1, 1, 2, 4], "datatype": "FP32", "data": [1.0] * 8}
UNNAMED = post("/v2/models/rules/infer", json.dumps({"inputs": [TENSOR]}).encode())


@dataclass
class Seen:
    """What the clients of the neighbour saw, and what happened meanwhile; times in seconds of one clock."""

    answers: list[tuple[float, float]] = field(default_factory=list)
    """When each was due, and when it was there."""
    refused: list[int] = field(default_factory=list)
    swaps: list[tuple[float, float]] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)

    def slowdown(self, begin: float, end: float) -> float:
        """p99 of the requests between these times that met a swap, over that of those that met none."""
        met: dict[bool, list[float]] = {True: [], False: []}
        for due, there in self.answers:
            if begin <= due < end:
                met[any(start < there and due < stop for start, stop in self.swaps)].append(there - due)
        return float(np.percentile(met[True], 99) / np.percentile(met[False], 99))


async def constant_load(service: RuleService, request: bytes, seen: Seen) -> None:
    """One request after the other, each due at its own time, until cancelled; what is late counts as late."""
    async with connected(service.port) as (reader, writer):
        due = time.perf_counter()
        while True:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            writer.write(request)
            status = (await read_reply(reader)).status
            if status == 200:
                seen.answers.append((due, time.perf_counter()))
            else:
                seen.refused.append(status)
            due = max(due + EVERY_S, time.perf_counter() - EVERY_S)


async def swap(service: RuleService, what: str, seen: Seen) -> None:
    started = time.perf_counter()
    reply = await ask(service.port, post(f"/v2/repository/models/rules/versions/large/{what}", b""))
    seen.swaps.append((started, time.perf_counter()))
    assert reply.status == 200, reply.json()
    await asyncio.sleep(PAUSE_S)


async def cycle(service: RuleService, seen: Seen) -> None:
    """Load, infer, unload; then look at the memory."""
    await swap(service, "load", seen)
    answers = await asyncio.gather(*(ask(service.port, infer_request("large", row(n))) for n in range(3)))
    assert [answer.status for answer in answers] == [200] * 3
    await swap(service, "unload", seen)
    assert (await ask(service.port, infer_request("large", row(1)))).status == 503
    seen.resident.append(service.rss())


@needs_proc
def test_a_hundred_cycles_leak_nothing_fail_nobody_and_keep_nobody_waiting(tmp_path: Path) -> None:
    async def scenario() -> list[float]:
        requests = [infer_request("onnx1", row(1))] * (CLIENTS - 1) + [UNNAMED]
        clients = [asyncio.create_task(constant_load(service, request, seen)) for request in requests]
        marks = [time.perf_counter()]
        for number in range(1, CYCLES + 1):
            await cycle(service, seen)
            if number % WINDOW == 0:
                marks.append(time.perf_counter())
        assert not any(client.done() for client in clients), "a client was disconnected"
        for client in clients:
            client.cancel()
        return [seen.slowdown(begin, end) for begin, end in pairwise(marks)]

    seen = Seen()
    with serving(tmp_path, "onnx1", "large", model_control="explicit") as service:
        asyncio.run(swap(service, "unload", Seen()))
        slowdowns = asyncio.run(scenario())
        assert service.metric("leanserve_variant_info", version="large", state="unloaded") == 1
    assert seen.refused == []
    growth = statistics.median(seen.resident[-20:]) - statistics.median(seen.resident[20:40])
    assert growth < LEAKED_BYTES, f"{growth / 2**20:.1f} MB; {[size >> 20 for size in seen.resident]}"
    assert statistics.median(slowdowns) < MAX_LATENCY_RATIO, [f"{slowdown:.2f}" for slowdown in slowdowns]
