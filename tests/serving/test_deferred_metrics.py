"""Batches are counted a moment after they were run, and in any case before anybody reads the numbers."""

from __future__ import annotations

import asyncio
import gc
import weakref

import numpy as np
import pytest

from leanserve.contracts import Arrays, Result
from leanserve.serving import deferred_metrics as tally
from leanserve.serving.batcher import QueueLimits
from leanserve.serving.opening import with_knees
from leanserve.serving.variant import Variant
from scripted import ScriptedBackend, play, sample, stay


class Telling(ScriptedBackend):
    """Tells of every batch how many rows it had; of one that is run again in halves, of the halves that worked."""

    def run(self, batch: Arrays) -> Result:
        return super().run(batch)._replace(facts={"rows_seen": len(batch[0])})


def test_what_a_backend_tells_is_summed() -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        backend.gate.clear()
        first = asyncio.create_task(variant.predict(sample(1, rows=2), stay))
        await asyncio.to_thread(backend.started.wait, 5)
        later = [asyncio.create_task(variant.predict(sample(value), stay)) for value in (1, -1, 2)]
        await asyncio.sleep(0.01)
        backend.gate.set()
        outcomes = await asyncio.gather(first, *later, return_exceptions=True)
        assert [isinstance(outcome, Exception) for outcome in outcomes] == [False, False, True, False]
        await asyncio.sleep(0)
        variant.metrics.catch_up()
        assert variant.metrics.backend_facts == {"rows_seen": 2 + 1 + 1}

    play(scenario, QueueLimits(4, 100), Telling())


def test_batches_are_counted_before_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "LATER_S", 0.01)

    async def scenario(variant: Variant, _: ScriptedBackend) -> None:
        for turn in (1, 2):  # the timer of the first turn is over, and another one is needed
            await variant.predict(sample(1, rows=3), stay)
            assert variant.metrics.rows.count == turn - 1
            async with asyncio.timeout(5):
                while variant.metrics.rows.count < turn:
                    await asyncio.sleep(0.001)
        assert (variant.metrics.rows.total, variant.metrics.queue.count) == (6, 2)

    play(scenario, QueueLimits(4, 100))


def test_many_batches_are_not_left_until_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "LATER_S", 60.0)

    async def scenario(variant: Variant, _: ScriptedBackend) -> None:
        for _turn in range(tally.MOST + 1):
            await variant.predict(sample(1), stay)
        await asyncio.sleep(0)
        assert variant.metrics.rows.count == tally.MOST
        variant.metrics.catch_up()
        assert variant.metrics.rows.count == tally.MOST + 1

    play(scenario, QueueLimits(4, 100))


def test_what_a_batch_costs_is_learnt_with_its_count() -> None:
    async def scenario(variant: Variant, _: ScriptedBackend) -> None:
        await variant.predict(sample(1), stay)
        await asyncio.sleep(0)
        assert variant.costs.tables[0].seconds(1) == 1.0
        variant.metrics.catch_up()
        assert variant.costs.tables[0].seconds(1) < 1.0

    play(scenario, QueueLimits(4, 100), seconds=1.0)


def test_requests_are_not_kept_until_their_batch_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "LATER_S", 60.0)

    async def scenario(variant: Variant, _: ScriptedBackend) -> None:
        array = np.ones((1, 2), np.float32)
        kept = weakref.ref(array)
        await variant.predict((array,), stay)
        del array
        async with asyncio.timeout(5):
            while kept() is not None:
                gc.collect()
                await asyncio.sleep(0.001)
        assert variant.metrics.rows.count == 0

    play(scenario, QueueLimits(4, 100))


def test_batches_follow_what_was_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "LEARNT_S", 0.0)

    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        (table,) = variant.costs.tables
        variant.batcher.limits = with_knees(variant.batcher.limits, variant.costs)
        most = table.knee
        assert most > 1
        for rows in table.buckets[1:]:
            for _ in range(200):
                table.observe(rows, 1000.0)
        await variant.predict(sample(1), stay)
        variant.metrics.catch_up()
        limits = variant.batcher.limits
        assert (limits.max_rows, limits.rows_at, limits.queue_rows) == (1, (1,), 100)
        backend.ran.clear()
        assert (await variant.predict(sample(1, rows=most), stay)).outputs[0].shape[0] == most
        assert backend.ran == [1] * most

    play(scenario, QueueLimits(4, 100))
