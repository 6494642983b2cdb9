""" "Overload makes everyone late": at ten times the capacity the goodput stays, what is admitted is in time."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from raw_http import PendingResult, ask, connected, infer_request, read_reply
from rule_service import RuleService, serving, until
from rules import row

MOST_ROWS, TIMEOUT_MS = 2, 60
CAPACITY = MOST_ROWS / 0.01
"""Rows per second: the variant `slow` takes 10 ms per batch."""
WORKERS, PERIOD_S = 200, 0.1
"""Each asks once per period, 2,000 times a second together; a reply takes at most about 70 ms."""
BATCH = {"max_rows": MOST_ROWS, "timeout_ms": TIMEOUT_MS}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RuleService]:
    with serving(tmp_path_factory.mktemp("overload"), "slow", batch=BATCH) as running:
        yield running


async def flood(service: RuleService, seconds: float) -> list[tuple[PendingResult, float]]:
    """Every reply at ten times the capacity, with the milliseconds it took; workers are spread over the period."""
    begin = time.perf_counter() + 0.2

    async def worker(number: int) -> list[tuple[PendingResult, float]]:
        got = []
        async with connected(service.port) as (reader, writer):
            due = begin + PERIOD_S * number / WORKERS
            while due < begin + seconds:
                await asyncio.sleep(due - time.perf_counter())
                asked = time.perf_counter()
                writer.write(infer_request("slow", row(number)))
                reply = await read_reply(reader)
                got.append((reply, (time.perf_counter() - asked) * 1000))
                due += PERIOD_S
        return got

    return [reply for replies in await asyncio.gather(*map(worker, range(WORKERS))) for reply in replies]


async def comfortable(service: RuleService, seconds: float) -> int:
    """How many requests are answered while there are just enough clients to keep the device busy."""
    end = time.perf_counter() + seconds

    async def client() -> int:
        answered = 0
        async with connected(service.port) as (reader, writer):
            while time.perf_counter() < end:
                writer.write(infer_request("slow", row(1)))
                answered += (await read_reply(reader)).status == 200
        return answered

    return sum(await asyncio.gather(*(client() for _ in range(3 * MOST_ROWS))))


def test_at_ten_times_the_capacity_goodput_stays_and_the_admitted_are_in_time(service: RuleService) -> None:
    seconds, ratios, late, replies = 1.2, [], [], []
    for _ in range(3):
        peak = asyncio.run(comfortable(service, seconds))
        got = asyncio.run(flood(service, seconds))
        assert len(got) > 8 * CAPACITY * seconds
        ratios.append(sum(reply.status == 200 for reply, _ in got) / peak)
        late.append(sum(reply.status == 504 for reply, _ in got) / peak)
        replies += got
    assert statistics.median(ratios) >= 0.95
    assert {reply.status for reply, _ in replies} <= {200, 429, 504}
    # Whoever is let in shall be answered: 504 is for the unforeseen, such as another program on these cores in a round.
    assert min(late) <= 0.01
    assert max(reply.how("queue_ms") for reply, _ in replies if reply.status == 200) <= TIMEOUT_MS
    assert np.percentile([ms for _, ms in replies], 99) < 2 * TIMEOUT_MS


def test_a_refusal_at_the_door_is_quick_and_says_when_to_come_again(service: RuleService) -> None:
    refused = [(reply, ms) for reply, ms in asyncio.run(flood(service, 0.5)) if reply.status == 429]
    assert {reply.json()["code"] for reply, _ in refused} == {"deadline_unreachable"}
    assert {reply.headers["retry-after"] for reply, _ in refused} == {"1"}  # whole seconds; it is less
    assert statistics.median(ms for _, ms in refused) < TIMEOUT_MS / 3


def test_retry_after_of_a_full_queue_is_the_time_that_it_takes_to_drain(tmp_path: Path) -> None:
    async def scenario(service: RuleService) -> tuple[PendingResult, float]:
        large = asyncio.create_task(ask(service.port, infer_request("slow", np.repeat(row(1), 300, axis=0))))
        await until(lambda: service.queued() > 200)
        refusal = await ask(service.port, infer_request("slow", np.repeat(row(1), 100, axis=0)))
        began = time.perf_counter()
        assert (await large).status == 200
        return refusal, time.perf_counter() - began

    with serving(tmp_path, "slow", batch={"max_rows": MOST_ROWS, "queue_rows": 300}) as service:
        refusal, drained_s = asyncio.run(scenario(service))
    assert (refusal.status, refusal.json()["code"]) == (429, "queue_full")
    assert drained_s - 0.5 < int(refusal.headers["retry-after"]) < drained_s + 1.5
