""" "Batching does nothing", "an idle server adds a wait", "a row's answer depends on its batch mates"."""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Iterator

import numpy as np
import pytest

from leanserve.contracts import Array
from raw_http import PendingResult, ask, connected, infer_request, read_reply
from rule_service import RuleService, serving, until
from rules import WIDTH, row


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RuleService]:
    with serving(tmp_path_factory.mktemp("batching"), "rule", "onnx") as running:
        yield running


async def behind_a_busy_device(service: RuleService, requests: list[bytes]) -> list[PendingResult]:
    """Send all requests at once, each on a connection of its own, while the device is busy; free it when all wait."""
    async with service.busy():
        asked = [asyncio.create_task(ask(service.port, request)) for request in requests]
        await until(lambda: service.queued() == len(requests))
    return await asyncio.gather(*asked)


@pytest.mark.parametrize("singles", [1, 33, 100])
def test_a_burst_of_singles_behind_a_busy_device_becomes_as_few_batches_as_can_be(
    service: RuleService, singles: int
) -> None:
    most = service.most_rows()
    rows, batches = service.executed()
    requests = [infer_request("rule", row(number)) for number in range(singles)]
    replies = asyncio.run(behind_a_busy_device(service, requests))
    assert [reply.outputs()[0] for reply in replies] == [10 * number for number in range(singles)]
    # One row and one batch kept the device busy.
    assert service.executed() == (rows + 1 + singles, batches + 1 + math.ceil(singles / most))
    shared = sorted((int(reply.how("batch_rows")) for reply in replies), reverse=True)
    full, rest = divmod(singles, most)
    assert shared == [most] * most * full + [rest] * rest


def test_an_idle_device_takes_a_lone_request_at_once(service: RuleService) -> None:
    async def ask_in_turn() -> list[PendingResult]:
        async with connected(service.port) as (reader, writer):
            replies = []
            for number in range(200):
                writer.write(infer_request("rule", row(number)))
                replies.append(await read_reply(reader))
            return replies

    _, batches = service.executed()
    replies = asyncio.run(ask_in_turn())
    assert service.executed()[1] == batches + 200
    assert {reply.how("batch_rows") for reply in replies} == {1}
    # The way to the device thread takes some 0.05 ms; the smallest of the fixed waits that others have is 1 ms.
    assert statistics.median(reply.how("queue_ms") for reply in replies) < 0.5


def test_a_row_is_answered_alike_alone_and_in_any_company(service: RuleService) -> None:
    random = np.random.default_rng(1)
    golden = random.standard_normal((24, 1, 2, 4)).astype(np.float32)
    requests = [infer_request("onnx", one[None]) for one in golden]

    async def alone() -> list[PendingResult]:
        return [await ask(service.port, request) for request in requests]

    expected = answers(asyncio.run(alone()))
    for _ in range(3):
        strangers = [infer_request("onnx", 1000 * other[None]) for other in random.permuted(golden)]
        mixed = random.permutation(len(golden) + len(strangers))
        replies = asyncio.run(behind_a_busy_device(service, [[*requests, *strangers][place] for place in mixed]))
        own = [replies[place] for place in np.argsort(mixed)[: len(golden)]]
        assert min(reply.how("batch_rows") for reply in own) > 1
        # Matrix products of another height add in another order: a few units in the last place of float32.
        np.testing.assert_allclose(answers(own), expected, rtol=1e-5, atol=1e-6)


def answers(replies: list[PendingResult]) -> Array:
    return np.array([reply.outputs() for reply in replies]).reshape(-1, WIDTH)
