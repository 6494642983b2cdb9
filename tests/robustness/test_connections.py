"""Clients that misbehave on the wire disturb nobody: half requests, pipelines, chunks, connections that are dropped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest

from leanserve.contracts import Array
from raw_http import ask, connected, infer_request, read_reply
from rule_service import RuleService, needs_proc, serving, until
from rules import row


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RuleService]:
    with serving(tmp_path_factory.mktemp("connections"), "rule") as running:
        yield running


async def others_are_answered(service: RuleService, first: int) -> None:
    """Fifty clients get their own answers, and soon."""
    requests = [infer_request("rule", row(first + number)) for number in range(50)]
    async with asyncio.timeout(5):
        replies = await asyncio.gather(*(ask(service.port, request) for request in requests))
    assert [reply.outputs()[0] for reply in replies] == [10 * (first + number) for number in range(50)]


def chunked(rows: Array, size: int) -> bytes:
    """An infer request whose body comes in chunks of that many bytes."""
    head, _, body = infer_request("rule", rows).partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"content-length")]
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    coded = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])
    return b"\r\n".join([*lines, b"transfer-encoding: chunked"]) + b"\r\n\r\n" + coded


@needs_proc
def test_half_requests_that_never_end_hold_up_nobody(service: RuleService) -> None:
    request = infer_request("rule", row(1))

    async def scenario() -> None:
        rows, _ = service.executed()
        async with AsyncExitStack() as stack:
            for number in range(300):
                _, writer = await stack.enter_async_context(connected(service.port))
                writer.write(request[: number % len(request)])
            await others_are_answered(service, 100)
            assert service.connections() >= 300
            assert service.queued() == 0
        await until(lambda: service.connections() == 0)
        assert service.executed()[0] == rows + 50

    asyncio.run(scenario())


def test_a_request_that_comes_byte_by_byte_is_answered_like_any_other(service: RuleService) -> None:
    async def scenario() -> None:
        async with connected(service.port) as (reader, writer):
            request = infer_request("rule", row(3))
            for place in range(len(request)):
                writer.write(request[place : place + 1])
                await writer.drain()
                await asyncio.sleep(0)
                if place == len(request) // 2:
                    await others_are_answered(service, 200)
            assert (await read_reply(reader)).outputs()[0] == 30

    asyncio.run(scenario())


def test_pipelined_requests_are_answered_in_their_order(service: RuleService) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(20), connected(service.port) as (reader, writer):
            bad = infer_request("rule", row(1)).replace(b"FP32", b"FP99")
            writer.write(b"".join(infer_request("rule", row(number)) + bad for number in range(100)))
            for number in range(100):
                assert (await read_reply(reader)).outputs()[0] == 10 * number
                assert (await read_reply(reader)).status == 400

    asyncio.run(scenario())


def test_who_drops_a_pipeline_is_forgotten_and_the_others_go_on(service: RuleService) -> None:
    async def scenario() -> None:
        async with service.busy():
            for _ in range(20):
                async with connected(service.port) as (_, writer):
                    writer.write(b"".join(infer_request("rule", row(number)) for number in range(10)))
                    await writer.drain()
            company = asyncio.create_task(others_are_answered(service, 300))
            await until(lambda: service.queued() >= 50)
        await company

    asyncio.run(scenario())
    assert service.queued() == 0
    give_up = time.monotonic() + 5
    while (held := service.census())["Ticket"] > 1 or held["Request"] > 1:  # the question's own
        assert time.monotonic() < give_up, held


def test_kept_connections_that_are_dropped_between_requests_hold_up_nobody(service: RuleService) -> None:
    async def come_and_go(number: int) -> None:
        async with connected(service.port) as (reader, writer):
            writer.write(infer_request("rule", row(number)))
            assert (await read_reply(reader)).outputs()[0] == 10 * number

    async def scenario() -> None:
        for _ in range(5):
            await asyncio.gather(*(come_and_go(number) for number in range(100)), others_are_answered(service, 400))

    asyncio.run(scenario())


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_chunked_bodies_keep_their_connection_and_a_broken_chunk_ends_only_its_own(
    service: RuleService, size: int
) -> None:
    async def scenario() -> None:
        async with connected(service.port) as (reader, writer), connected(service.port) as (_, broken):
            for number in range(5):
                writer.write(chunked(row(number), size))
                assert (await read_reply(reader)).outputs()[0] == 10 * number
            broken.write(chunked(row(1), size)[:-9] + b"zz\r\n")
            await broken.drain()
            writer.write(chunked(row(9), size))
            assert (await read_reply(reader)).outputs()[0] == 90
            await others_are_answered(service, 500)

    asyncio.run(scenario())
