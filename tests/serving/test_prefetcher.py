"""The next batch is joined while all lanes are busy, and nothing else about it is settled before a lane takes it."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from functools import partial
from operator import eq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanserve.contracts import Arrays, ModelSpec, Result, TensorSpec
from leanserve.errors import ClientGone, QueueTimeout
from leanserve.runtime import assembly
from leanserve.serving import batch_runner as execution
from leanserve.serving import prefetcher as ahead
from leanserve.serving.batch_runner import Prediction
from leanserve.serving.batcher import Batcher, QueueLimits, Ticket
from leanserve.serving.variant import Variant
from scripted import SPEC, ScriptedBackend, hold, play, sample, stay

ASIDE = "device-test-aside_0"


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Who joined how many rows: the name of the thread. However few they are, they are worth it."""
    seen: list[tuple[str, int]] = []

    def join(samples: Sequence[Arrays], spec: ModelSpec, rows: int) -> Arrays:
        joined = assembly.join(samples, spec, rows)
        seen.append((threading.current_thread().name, rows))
        return joined

    monkeypatch.setattr(execution, "join", join)
    monkeypatch.setattr(ahead, "WORTH_BYTES", 1)
    return seen


async def ask(variant: Variant, count: int, timeout_s: float = 10) -> list[asyncio.Task[Prediction]]:
    """So many single rows, queued."""
    tasks = [asyncio.create_task(variant.predict(sample(value), stay, timeout_s)) for value in range(count)]
    await asyncio.sleep(0)
    return tasks


def queue_behind_a_busy_lane(count: int, *, spare: bool) -> None:
    """For long enough that whoever would join these rows ahead, four at a time, has done it."""

    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        busy = await hold(variant, backend)
        tasks = await ask(variant, count)
        await asyncio.sleep(0.05)
        backend.gate.set()
        await asyncio.gather(busy, *tasks)

    play(scenario, QueueLimits(4, 100), spare=spare)


async def until_joined(joins: list[tuple[str, int]], times: int = 1) -> None:
    async with asyncio.timeout(5):
        while Counter(name for name, _ in joins)[ASIDE] < times:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("lanes", [1, 2])
def test_the_next_full_batch_is_joined_while_the_lanes_are_busy(joins: list[tuple[str, int]], lanes: int) -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        busy = [await hold(variant, backend) for _ in range(lanes)]
        async with asyncio.timeout(5):
            while not variant.running.device.busy():
                await asyncio.sleep(0.001)
        tasks = await ask(variant, 10)
        await until_joined(joins)
        assert variant.waiting_rows() == 10, "what is joined is not taken"
        backend.gate.set()
        predictions = await asyncio.gather(*tasks)
        assert [prediction.outputs[0][0, 0] for prediction in predictions] == [2 * value for value in range(10)]
        await asyncio.gather(*busy)

    play(scenario, QueueLimits(4, 100), lanes=lanes, spare=True)
    assert joins[lanes] == (ASIDE, 4)
    assert sum(rows for name, rows in joins if name != ASIDE) <= lanes + 10 - 4, "no lane has joined these again"


def test_no_batch_is_joined_before_it_is_full(joins: list[tuple[str, int]]) -> None:
    queue_behind_a_busy_lane(3, spare=True)
    assert joins == [("device-test-0", 1), ("device-test-0", 3)]


def test_lanes_that_fill_all_cores_join_themselves(joins: list[tuple[str, int]]) -> None:
    queue_behind_a_busy_lane(8, spare=False)
    assert {name for name, _ in joins} == {"device-test-0"}


def test_what_a_free_lane_will_take_is_not_joined_ahead(joins: list[tuple[str, int]]) -> None:
    async def scenario(variant: Variant, _: ScriptedBackend) -> None:
        await asyncio.gather(*await ask(variant, 4))

    play(scenario, QueueLimits(4, 100), spare=True)
    assert joins == [("device-test-0", 4)]


def test_a_backend_elsewhere_leaves_its_lane_s_core_to_whoever_joins(joins: list[tuple[str, int]]) -> None:
    class Remote(ScriptedBackend):
        device = "cuda"

    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        busy = await hold(variant, backend)
        tasks = await ask(variant, 4)
        await until_joined(joins)
        backend.gate.set()
        await asyncio.gather(busy, *tasks)

    play(scenario, QueueLimits(4, 100), Remote(), spare=False)


def test_small_batches_are_not_worth_a_thread(joins: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "WORTH_BYTES", 4 * 2 * 4 + 1)  # four rows of two floats, and one more byte

    queue_behind_a_busy_lane(8, spare=True)
    assert {name for name, _ in joins} == {"device-test-0"}


def test_whose_client_leaves_after_it_was_joined_is_not_executed(joins: list[tuple[str, int]]) -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        busy = await hold(variant, backend)
        left = threading.Event()
        leaves = asyncio.create_task(variant.predict(sample(50), left.is_set))
        tasks = await ask(variant, 3)
        await until_joined(joins)
        left.set()
        backend.gate.set()
        predictions = await asyncio.gather(*tasks)
        assert [prediction.outputs[0][0, 0] for prediction in predictions] == [0, 2, 4]
        with pytest.raises(ClientGone):
            await leaves
        await busy
        assert backend.ran == [1, 3]

    play(scenario, QueueLimits(4, 100), spare=True)


def test_what_expires_after_it_was_joined_is_not_executed(joins: list[tuple[str, int]]) -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        busy = await hold(variant, backend)
        tasks = await ask(variant, 4, timeout_s=0.05)
        await until_joined(joins)
        for task in tasks:
            with pytest.raises(QueueTimeout):
                await task
        backend.gate.set()
        await busy
        assert backend.ran == [1]

    play(scenario, QueueLimits(4, 100), spare=True)


def test_a_more_urgent_request_overtakes_what_is_joined(joins: list[tuple[str, int]]) -> None:
    ran: list[list[float]] = []

    class Remembering(ScriptedBackend):
        def run(self, batch: Arrays) -> Result:
            ran.append(batch[0][:, 0].tolist())
            return super().run(batch)

    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        busy = await hold(variant, backend)
        tasks = await ask(variant, 2)
        await until_joined(joins)
        urgent = asyncio.create_task(variant.predict(sample(50, rows=2), stay, priority=1))
        await asyncio.sleep(0)
        backend.gate.set()
        predictions = await asyncio.gather(urgent, *tasks)
        assert [prediction.outputs[0][0, 0] for prediction in predictions] == [100, 0, 2]
        await busy
        assert ran == [[100], [50, 50], [0, 1]]

    play(scenario, QueueLimits(2, 100, levels=2, default_level=2), Remembering(), spare=True)


def test_a_bad_row_in_what_was_joined_fails_alone(joins: list[tuple[str, int]]) -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        busy = await hold(variant, backend)
        bad = asyncio.create_task(variant.predict(sample(-1), stay))
        tasks = await ask(variant, 3)
        await until_joined(joins)
        backend.gate.set()
        assert [prediction.outputs[0][0, 0] for prediction in await asyncio.gather(*tasks)] == [0, 2, 4]
        with pytest.raises(Exception, match="the model failed on this request"):
            await bad
        await busy

    play(scenario, QueueLimits(4, 100), spare=True)


def test_nothing_that_was_joined_is_kept(joins: list[tuple[str, int]]) -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        busy = await hold(variant, backend)
        array = np.ones((1, 2), np.float32)
        kept = weakref.ref(array)
        tasks = [asyncio.create_task(variant.predict((array,), stay)), *await ask(variant, 3)]
        await until_joined(joins)
        del array
        backend.gate.set()
        await asyncio.gather(busy, *tasks)
        tasks.clear()
        del busy
        await asyncio.sleep(0.05)
        gc.collect()
        assert kept() is None

    play(scenario, QueueLimits(4, 100), spare=True)


def test_what_was_joined_too_late_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on = threading.Event(), threading.Event()

    def join(samples: Sequence[Arrays], spec: ModelSpec, rows: int) -> Arrays:
        if threading.current_thread().name == ASIDE:
            began.set()
            assert go_on.wait(5)
        return assembly.join(samples, spec, rows)

    monkeypatch.setattr(execution, "join", join)
    monkeypatch.setattr(ahead, "WORTH_BYTES", 1)

    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        busy = await hold(variant, backend)
        array = np.ones((1, 2), np.float32)
        kept = weakref.ref(array)
        tasks = [asyncio.create_task(variant.predict((array,), stay)), *await ask(variant, 3)]
        assert await asyncio.to_thread(began.wait, 5)
        backend.gate.set()
        predictions = await asyncio.gather(*tasks)
        assert [prediction.outputs[0][0, 0] for prediction in predictions] == [2, 0, 2, 4]
        assert backend.ran == [1, 4]
        go_on.set()
        del array, predictions
        tasks.clear()
        await busy
        async with asyncio.timeout(5):
            while kept() is not None:
                gc.collect()
                await asyncio.sleep(0.01)

    play(scenario, QueueLimits(4, 100), spare=True)


def test_the_bytes_of_a_row_are_those_of_the_longest() -> None:
    assert SPEC.row_bytes == 2 * 4
    ids, mask = TensorSpec("ids", "int64", (None,)), TensorSpec("mask", "uint8", (None, 2))
    assert ModelSpec((ids, mask), (), max_length=100).row_bytes == 100 * 8 + 100 * 2


ARRIVALS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 2), st.sampled_from(["alive", "gone", "late"])))


@given(ARRIVALS)
def test_what_is_joined_is_what_would_be_taken_if_that_is_full(arrivals: list[tuple[int, int, str]]) -> None:
    batcher: Batcher[str] = Batcher(QueueLimits(4, 1000, levels=2))
    for rows, level, fate in arrivals:
        deadline = 0.5 if fate == "late" else 9.0
        array = np.zeros((rows, 1), np.float32)
        batcher.offer(
            [Ticket((array,), fate, deadline=deadline, is_disconnected=partial(eq, fate, "gone"), level=level)], 0.0
        )
    waiting = batcher.waiting_rows
    ahead_of_time = batcher.next_full(1.0)
    assert batcher.waiting_rows == waiting
    taken = batcher.take(1.0).batch
    alive_still = [item for item in iter(lambda: batcher.take(1.0).batch, []) if item]
    full = sum(item.rows for item in taken) >= 4 or bool(alive_still)
    assert ahead_of_time == (taken if full else [])
