"""A variant whose rows differ in length: who shares a batch, and what admission expects."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np
import pytest

from leanserve.contracts import Arrays, ModelSpec, Result, TensorSpec
from leanserve.errors import BadInput, DeadlineUnreachable
from leanserve.runtime.costs import Costs, CostTable
from leanserve.runtime.device import Device
from leanserve.runtime.lanes import LoadedVariant
from leanserve.serving.batcher import QueueLimits
from leanserve.serving.variant import Variant
from scripted import act, stay, warm_variant

TOKENS = ModelSpec(
    (TensorSpec("ids", "int64", (None,), pad=9),),
    (TensorSpec("tags", "int64", (None,)), TensorSpec("total", "int64", ())),
    max_length=64,
)


class Tagger:
    """Answers every token with its double, and the number of real ones; remembers the shapes it ran."""

    name = "tagger"
    self_contained = False
    device = "cpu"
    row_buckets: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.started = threading.Event()
        self.shapes: list[tuple[int, ...]] = []

    def run(self, batch: Arrays) -> Result:
        self.started.set()
        assert self.gate.wait(10)
        self.shapes.append(batch[0].shape)
        return Result((batch[0] * 2, (batch[0] != 9).sum(1)))

    def close(self) -> None: ...


def tokens(length: int, rows: int = 1) -> Arrays:
    return (np.full((rows, length), length, np.int64),)


def play_tokens(scenario: Callable[[Variant, Tagger], Awaitable[None]], spec: ModelSpec = TOKENS) -> Variant:
    """Length buckets to 16 of four rows, to 32 of two, to 64 of one; a batch costs as many s."""
    backend, device = Tagger(), Device("test", 1)
    costs = Costs([CostTable({rows: float(length)}) for length, rows in ((16, 4), (32, 2), (64, 1))], (16, 32, 64))
    limits = QueueLimits(4, 100, timeout_s=1000, lengths=(16, 32, 64), rows_at=(4, 2, 1))
    warm = warm_variant(LoadedVariant(device, (backend,), costs), limits, spec=spec)
    return act(warm, lambda variant: scenario(variant, backend), backend.gate)


def test_lengths_share_a_batch_within_their_bucket_and_get_answers_of_their_own_length() -> None:
    async def scenario(variant: Variant, backend: Tagger) -> None:
        first = asyncio.create_task(variant.predict(tokens(1), stay))
        await asyncio.to_thread(backend.started.wait, 5)
        lengths = [5, 40, 12, 20, 3, 17]
        tasks = [asyncio.create_task(variant.predict(tokens(length), stay)) for length in lengths]
        await asyncio.sleep(0)
        backend.gate.set()
        predictions = await asyncio.gather(*tasks)
        await first
        assert backend.shapes == [(1, 1), (3, 12), (1, 40), (2, 20)]
        for length, prediction in zip(lengths, predictions, strict=True):
            tags, total = prediction.outputs
            assert tags.tolist() == [[2 * length] * length]
            assert total.tolist() == [length]

    variant = play_tokens(scenario)
    assert variant.metrics.padding_tokens == (12 - 5) + (12 - 3) + (20 - 17)
    assert variant.metrics.padding_rows == 0


def test_rows_of_one_length_never_meet_a_longer_one() -> None:
    async def scenario(variant: Variant, backend: Tagger) -> None:
        first = asyncio.create_task(variant.predict(tokens(1), stay))
        await asyncio.to_thread(backend.started.wait, 5)
        lengths = [5, 12, 5, 20, 12, 5]
        tasks = [asyncio.create_task(variant.predict(tokens(length), stay)) for length in lengths]
        await asyncio.sleep(0)
        backend.gate.set()
        predictions = await asyncio.gather(*tasks)
        await first
        assert backend.shapes == [(1, 1), (3, 5), (2, 12), (1, 20)]
        assert [prediction.outputs[1].tolist() for prediction in predictions] == [[length] for length in lengths]

    variant = play_tokens(scenario, replace(TOKENS, rows="one_length"))
    assert variant.metrics.padding_tokens == 0


def test_a_large_request_is_cut_by_the_knee_of_its_length() -> None:
    async def scenario(variant: Variant, backend: Tagger) -> None:
        backend.gate.set()
        for length in (16, 32, 64):
            prediction = await variant.predict(tokens(length, rows=4), stay)
            assert prediction.outputs[0].shape == (4, length)
        assert backend.shapes == [(4, 16), (2, 32), (2, 32), (1, 64), (1, 64), (1, 64), (1, 64)]

    play_tokens(scenario)


def test_admission_counts_the_lengths_that_wait() -> None:
    async def scenario(variant: Variant, backend: Tagger) -> None:
        first = asyncio.create_task(variant.predict(tokens(64), stay))
        await asyncio.to_thread(backend.started.wait, 5)
        waiting = [asyncio.create_task(variant.predict(tokens(length), stay)) for length in (8, 8, 32, 30, 64)]
        await asyncio.sleep(0)
        assert variant.wait_s(level=1) == pytest.approx(64 + 16 + 32 + 64, abs=1)
        with pytest.raises(DeadlineUnreachable):
            await variant.predict(tokens(8), stay, timeout_s=170)
        backend.gate.set()
        await asyncio.gather(first, *waiting)

    play_tokens(scenario)


def test_what_is_longer_than_the_model_takes_is_refused() -> None:
    async def scenario(variant: Variant, backend: Tagger) -> None:
        with pytest.raises(BadInput, match="65 long; this model takes at most 64"):
            await variant.predict(tokens(65), stay)

    play_tokens(scenario)


@pytest.mark.parametrize(
    ("step", "least", "length", "reason"),
    [
        (8, 1, 12, "axis 1 of 'ids' has size 12; this model takes multiples of 8$"),
        (1, 20, 12, "axis 1 of 'ids' has size 12; this model takes sizes from 20 up$"),
        (8, 20, 16, "axis 1 of 'ids' has size 16; this model takes multiples of 8 from 24 up$"),
    ],
)
def test_sizes_on_which_the_model_does_not_run_are_refused(step: int, least: int, length: int, reason: str) -> None:
    async def scenario(variant: Variant, backend: Tagger) -> None:
        with pytest.raises(BadInput, match=reason):
            await variant.predict(tokens(length), stay)
        backend.gate.set()
        await variant.predict(tokens(24), stay)

    play_tokens(scenario, replace(TOKENS, step=step, least=least))
