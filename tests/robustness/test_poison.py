""" "One bad request fails its whole batch", "one exception kills the batch loop"."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from leanserve.contracts import Array
from raw_http import PendingResult, ask, binary_request, infer_request, post
from rule_service import RuleService, serving, until
from rules import EXIT, GARBAGE, LABELS, RAISE, row

GOOD, ROUNDS = 12, 20


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RuleService]:
    folder = tmp_path_factory.mktemp("poison")
    with serving(folder, "rule", "dynamic", "tensor", traffic={"weights": {"rule": 1}}) as running:
        yield running


def image(number: int) -> bytes:
    """A request with a PNG whose brightest pixel is the one of that number."""
    image = Image.frombytes("L", (4, 2), bytes(255 if place == number % 8 else 0 for place in range(8)))
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return post("/v1/predict", buffer.getvalue(), "content-type: image/png")


def cut(request: bytes) -> bytes:
    """The same image with its pixel data damaged, its length as declared."""
    return request[:-30] + bytes(30)


async def among_good_ones(
    service: RuleService, bad: bytes, good: list[bytes], *, place: int, queued: int
) -> list[PendingResult]:
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


def test_a_malformed_image_fails_alone(service: RuleService) -> None:
    good = [image(number) for number in range(GOOD)]
    for turn in range(ROUNDS):
        *replies, failed = asyncio.run(among_good_ones(service, cut(image(turn)), good, place=turn % 13, queued=GOOD))
        assert [reply.json()["label"] for reply in replies] == [LABELS[number % 8] for number in range(GOOD)]
        assert (failed.status, failed.json()["code"]) == (400, "bad_input")


def honest(number: int) -> Array:
    return np.random.default_rng(number).standard_normal((1, 1, 2, 4)).astype(np.float32)


def whole(value: float) -> Array:
    return np.full((1, 1, 2, 4), value, np.float32)


def answers_alone(service: RuleService, variant: str) -> list[Array]:
    async def asked() -> list[Array]:
        return [(await ask(service.port, binary_request(variant, honest(number)))).binary() for number in range(GOOD)]

    return asyncio.run(asked())


@pytest.mark.parametrize(
    "poison",
    [whole(1000), whole(1e30), row(np.nan, 1, 2), row(1, np.inf), row(-np.inf)],
    ids=["a thousand", "near the largest float", "NaN", "infinity", "minus infinity"],
)
def test_numbers_of_a_stranger_change_no_answer(service: RuleService, poison: Array) -> None:
    alone = answers_alone(service, "dynamic")
    good = [binary_request("dynamic", honest(number)) for number in range(GOOD)]
    turns = among_good_ones(service, binary_request("dynamic", poison), good, place=5, queued=GOOD + 1)
    *replies, strange = asyncio.run(turns)
    assert max(reply.how("batch_rows") for reply in replies) > 1, "they did share a batch"
    for reply, right in zip(replies, alone, strict=True):
        np.testing.assert_allclose(reply.binary(), right, rtol=0, atol=1e-6 * np.abs(right).max())
    assert strange.status == 200
    assert np.isfinite(strange.binary()).all() == np.isfinite(poison).all()
    as_json = asyncio.run(ask(service.port, binary_request("dynamic", poison, "json")))
    assert as_json.status == (200 if np.isfinite(poison).all() else 400), "JSON has no NaN"


@pytest.mark.parametrize("poison", [row(np.nan, 1, 2), row(1, np.inf), row(-np.inf)], ids=["NaN", "infinity", "minus"])
def test_what_is_no_number_runs_alone_where_rows_share_a_scale(service: RuleService, poison: Array) -> None:
    good = [binary_request("tensor", honest(number)) for number in range(GOOD)]
    turns = among_good_ones(service, binary_request("tensor", poison), good, place=5, queued=GOOD + 1)
    *replies, strange = asyncio.run(turns)
    assert all(np.isfinite(reply.binary()).all() for reply in replies)
    assert (strange.status, strange.how("batch_rows")) == (200, 1)


@pytest.mark.parametrize("order", [RAISE, EXIT, GARBAGE])
def test_the_loop_goes_on_after_a_failure_on_a_request_alone(service: RuleService, order: float) -> None:
    async def scenario() -> None:
        for number in range(50):
            assert (await ask(service.port, infer_request("rule", row(order)))).status == 500
            assert (await ask(service.port, infer_request("rule", row(number)))).outputs()[0] == 10 * number

    asyncio.run(scenario())
