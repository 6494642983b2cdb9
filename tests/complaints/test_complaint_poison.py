""" "One bad request fails its whole batch", "one exception kills the batch loop"."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from io import BytesIO

import pytest
from PIL import Image
from raw_http import Reply, ask, infer_request, post
from rule_service import RuleService, serving, until
from rules import EXIT, GARBAGE, LABELS, RAISE, row

GOOD, ROUNDS = 12, 20


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RuleService]:
    with serving(tmp_path_factory.mktemp("poison"), "rule") as running:
        yield running


def picture(number: int) -> bytes:
    """A request with a PNG whose brightest pixel is the one of that number."""
    image = Image.frombytes("L", (4, 2), bytes(255 if place == number % 8 else 0 for place in range(8)))
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return post("/v1/predict", buffer.getvalue(), "content-type: image/png")


def cut(request: bytes) -> bytes:
    """The same picture with its pixel data damaged, its length as declared."""
    return request[:-30] + bytes(30)


async def among_good_ones(
    service: RuleService, bad: bytes, good: list[bytes], *, place: int, queued: int
) -> list[Reply]:
    """All at once behind a busy device, so that they share a batch; the bad one's reply comes last."""
    requests = [*good[:place], bad, *good[place:]]
    async with service.busy():
        asked = [asyncio.create_task(ask(service.port, request)) for request in requests]
        await until(lambda: service.queued() == queued)
    replies = await asyncio.gather(*asked)
    return [*replies[:place], *replies[place + 1 :], replies[place]]


@pytest.mark.parametrize("order", [RAISE, EXIT, GARBAGE])
def test_a_row_on_which_the_model_fails_fails_alone(service: RuleService, order: float) -> None:
    good = [infer_request("rule", row(number)) for number in range(GOOD)]
    for turn in range(ROUNDS):
        poison = among_good_ones(service, infer_request("rule", row(order)), good, place=turn % 13, queued=GOOD + 1)
        *replies, failed = asyncio.run(poison)
        assert [reply.status for reply in replies] == [200] * GOOD
        assert [reply.outputs()[0] for reply in replies] == [10 * number for number in range(GOOD)]
        assert (failed.status, failed.json()["code"]) == (500, "backend_failed")
        assert "ordered" not in failed.json()["error"]  # the log has the details


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        (infer_request("rule", row(1)).replace(b'"shape": [1', b'"shape": [2'), "bad_input"),
        (infer_request("rule", row(1)).replace(b"0.0]", b"NaN]"), "bad_input"),
        (infer_request("rule", row(1))[:-1] + b"\xff", "bad_input"),
    ],
)
def test_a_malformed_tensor_fails_alone(service: RuleService, bad: bytes, code: str) -> None:
    good = [infer_request("rule", row(number)) for number in range(GOOD)]
    for turn in range(ROUNDS):
        *replies, failed = asyncio.run(among_good_ones(service, bad, good, place=turn % 13, queued=GOOD))
        assert [reply.outputs()[0] for reply in replies] == [10 * number for number in range(GOOD)]
        assert (failed.status, failed.json()["code"]) == (400, code)


def test_a_malformed_picture_fails_alone(service: RuleService) -> None:
    good = [picture(number) for number in range(GOOD)]
    for turn in range(ROUNDS):
        *replies, failed = asyncio.run(among_good_ones(service, cut(picture(turn)), good, place=turn % 13, queued=GOOD))
        assert [reply.json()["label"] for reply in replies] == [LABELS[number % 8] for number in range(GOOD)]
        assert (failed.status, failed.json()["code"]) == (400, "bad_input")


@pytest.mark.parametrize("order", [RAISE, EXIT, GARBAGE])
def test_the_loop_goes_on_after_a_failure_on_a_request_alone(service: RuleService, order: float) -> None:
    async def scenario() -> None:
        for number in range(50):
            assert (await ask(service.port, infer_request("rule", row(order)))).status == 500
            assert (await ask(service.port, infer_request("rule", row(number)))).outputs()[0] == 10 * number

    asyncio.run(scenario())
