""" "A disconnect is never seen, or fails its neighbours, or leaks": a thousand clients of which half leave."""

from __future__ import annotations

import asyncio
import random
import resource
import struct
import time
from collections.abc import Iterator
from itertools import pairwise
from socket import SO_LINGER, SOL_SOCKET

import pytest

from raw_http import connected, infer_request, read_reply
from rule_service import RuleService, needs_proc, serving, until
from rules import row

OURS = ("Ticket", "Request", "Task")
CLIENTS, ROUNDS = 1000, 10
WARM_ROUNDS = 15
LEAKED_BYTES = 2 * 2**20
"""Most growth per round. A ticket with its future and rows has about 2 KB; 500 of them kept would be a megabyte."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RuleService]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4 * CLIENTS:  # two ends, and some
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * CLIENTS), hard))
    with serving(tmp_path_factory.mktemp("disconnects"), "rule", batch={"queue_rows": 2 * CLIENTS}) as running:
        yield running


async def leave(service: RuleService, rng: random.Random) -> None:
    """Connect, and leave before, within or after the request, with an orderly end or a reset."""
    request = infer_request("rule", row(rng.random()))
    head = request.index(b"\r\n\r\n") + 4
    sent = rng.choice([0, rng.randrange(1, head), rng.randrange(head, len(request)), len(request), len(request)])
    async with connected(service.port) as (_, writer):
        writer.write(request[:sent])
        await writer.drain()
        await asyncio.sleep(rng.choice([0, rng.random() * 0.05]))
        if rng.random() < 0.5:
            writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))


async def stay(service: RuleService, number: int) -> None:
    """Send a request, perhaps in two pieces, and get one's own answer."""
    request = infer_request("rule", row(number))
    async with asyncio.timeout(30), connected(service.port) as (reader, writer):
        writer.write(request[: number * 7 % len(request)])
        await asyncio.sleep(0)
        writer.write(request[number * 7 % len(request) :])
        reply = await read_reply(reader)
    assert reply.status == 200
    assert reply.outputs()[0] == 10 * number


def crowd(service: RuleService, seed: int) -> tuple[list[asyncio.Task[None]], list[asyncio.Task[None]]]:
    """A thousand clients at once, in any order: those that leave, those that stay."""
    rng = random.Random(seed)
    numbers = list(range(CLIENTS))
    rng.shuffle(numbers)
    leavers, stayers = [], []
    for number in numbers:
        if number % 2:
            leavers.append(asyncio.create_task(leave(service, rng)))
        else:
            stayers.append(asyncio.create_task(stay(service, number)))
    return leavers, stayers


@needs_proc
def test_who_left_while_the_device_was_busy_is_not_executed_and_who_stayed_is_answered(service: RuleService) -> None:
    async def scenario() -> None:
        async with service.busy():
            leavers, stayers = crowd(service, seed=0)
            await asyncio.gather(*leavers)
            # The stayers and the one that keeps the device busy are all that is connected.
            await until(lambda: service.connections() == CLIENTS // 2 + 1)
            await until(lambda: service.queued() >= CLIENTS // 2)
        await asyncio.gather(*stayers)
        await until(lambda: service.connections() == 0)

    rows, _ = service.executed()
    asyncio.run(scenario())
    # Wanted: half of the clients, and the row that kept the device busy. Nothing else was in flight.
    assert service.executed()[0] == rows + CLIENTS // 2 + 1
    assert service.queued() == 0
    gone = service.metric("leanserve_requests_total", version="rule", outcome="client_gone")
    assert CLIENTS // 8 < gone < CLIENTS // 2
    assert service.metric("leanserve_requests_total", version="rule", outcome="ok") == CLIENTS // 2 + 1


def let_go(service: RuleService, empty: dict[str, int], within: float = 2.0) -> bool:
    """Whether nothing is held any more, once the lane has finished the batch of those that left last."""
    give_up = time.monotonic() + within
    while (held := service.census()) and any(held[name] != empty[name] for name in OURS):
        if time.monotonic() > give_up:
            return False
        time.sleep(0.05)
    return True


@needs_proc
def test_thousands_of_leavers_leave_nothing_behind(service: RuleService) -> None:
    async def one_round(seed: int) -> None:
        leavers, stayers = crowd(service, seed)
        await asyncio.gather(*leavers, *stayers)
        await until(lambda: service.connections() == 0)

    assert let_go(service, dict.fromkeys(OURS, 1))
    empty = service.census()
    assert (empty["Ticket"], empty["Request"], empty["Exchange"]) == (1, 1, 1)  # the question's own
    resident = []
    for seed in range(WARM_ROUNDS + ROUNDS):
        asyncio.run(one_round(seed))
        assert let_go(service, empty), service.census()
        assert service.queued() == 0
        resident.append(service.rss())
    # The first rounds fill what is kept for later use: the memory allocator's pools, the threads' stacks. Over 45
    # rounds memory was seen to rise by 3 MB and then to stay; a leaked sample per leaver is 2.7 MB in ten rounds.
    growth = resident[-1] - resident[WARM_ROUNDS - 1]
    assert growth < LEAKED_BYTES, [later - earlier for earlier, later in pairwise(resident)]
    # uvicorn keeps what belonged to a connection that was reset until its keep-alive time of 5 s is over.
    give_up = time.monotonic() + 15
    while service.census() != empty:
        assert time.monotonic() < give_up
        time.sleep(0.2)
