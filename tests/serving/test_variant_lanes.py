"""Where a batch runs: on which lane, on all of them, or on the event loop itself."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from leanserve.contracts import Arrays, Result
from leanserve.errors import BackendFailed
from leanserve.runtime.costs import Costs, CostTable
from leanserve.runtime.device import Device, Lane
from leanserve.runtime.lanes import LanePlacement, LoadedVariant
from leanserve.serving.batch_runner import Prediction
from leanserve.serving.batcher import QueueLimits, Ticket
from leanserve.serving.short_batches import SHORT_S
from leanserve.serving.variant import Variant
from leanserve.serving.wide_lanes import WideLanes
from leanserve.telemetry.observations import VariantFacts, VariantMetrics
from scripted import ScriptedBackend, act, play, sample, stay, warm_variant


def test_a_second_lane_runs_what_waits_while_the_first_is_busy() -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        backend.gate.clear()
        tasks = [asyncio.create_task(variant.predict(sample(i), stay)) for i in range(6)]
        async with asyncio.timeout(5):
            while variant.waiting_rows() > 2:  # both lanes hold two rows, at the same time
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        assert variant.waiting_rows() == 2
        assert variant.wait_s(level=1) == pytest.approx(1.0 + 1.0 / 2, abs=0.2), "two lanes drain the queue"
        backend.gate.set()
        predictions = await asyncio.gather(*tasks)
        assert [prediction.outputs[0][0, 0] for prediction in predictions] == [2 * i for i in range(6)]

    variant = play(scenario, QueueLimits(2, 100), seconds=1.0, lanes=2)
    assert (variant.metrics.rows.total, variant.metrics.rows.count) == (6, 3)


def test_lanes_count_every_batch_and_no_answer_goes_astray() -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        async def client(value: int) -> None:
            for turn in range(40):
                wanted = -1 if (value + turn) % 13 == 0 else value
                try:
                    prediction = await variant.predict(sample(wanted), stay)
                except BackendFailed:
                    assert wanted == -1
                else:
                    assert prediction.outputs[0].tolist() == [[2 * value, 2 * value]]

        await asyncio.gather(*(client(value) for value in range(1, 25)))

    variant = play(scenario, QueueLimits(4, 100), lanes=3)
    failed = sum((value + turn) % 13 == 0 for value in range(1, 25) for turn in range(40))
    assert variant.metrics.rows.total == 24 * 40 - failed
    assert variant.waiting_rows() == 0


def test_a_neighbour_that_came_meanwhile_goes_before_the_rest_of_a_burst() -> None:
    order: list[str] = []

    class Named(ScriptedBackend):
        def __init__(self, label: str) -> None:
            super().__init__()
            self.label = label

        def run(self, batch: Arrays) -> Result:
            order.append(self.label)
            return super().run(batch)

    async def body(device: Device) -> None:
        backends = {label: Named(label) for label in "ab"}
        variants = {}
        for label, backend in backends.items():
            running = LoadedVariant(device, (backend,), Costs([CostTable({1: 0.001})]))
            warm = warm_variant(running, QueueLimits(1, 100), label)
            variants[label] = Variant(warm, VariantMetrics(label, VariantFacts()))
        for variant in variants.values():
            variant.neighbours = [other for other in variants.values() if other is not variant]
        backends["a"].gate.clear()
        burst = [asyncio.create_task(variants["a"].predict(sample(1), stay)) for _ in range(4)]
        await asyncio.to_thread(backends["a"].started.wait, 5)
        lone = asyncio.create_task(variants["b"].predict(sample(1), stay))
        await asyncio.sleep(0.02)
        backends["a"].gate.set()
        await asyncio.gather(lone, *burst)

    device = Device("test", 1)
    try:
        asyncio.run(asyncio.wait_for(body(device), 20))
    finally:
        device.close()
    assert "".join(order) == "abaaa"


class Whereabouts(ScriptedBackend):
    """Remembers the threads on which it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[str] = []

    def run(self, batch: Arrays) -> Result:
        self.threads.append(threading.current_thread().name)
        return super().run(batch)


@pytest.mark.parametrize(("seconds", "thread"), [(40e-6, "MainThread"), (60e-6, "device-test-0")])
def test_a_batch_of_microseconds_is_run_by_the_loop_itself(seconds: float, thread: str) -> None:
    backend = Whereabouts()

    async def scenario(variant: Variant, _: ScriptedBackend) -> None:
        predictions = await asyncio.gather(*(variant.predict(sample(i), stay) for i in range(3)))
        assert [prediction.outputs[0][0, 0] for prediction in predictions] == [0, 2, 4]
        assert {prediction.batch_size for prediction in predictions} == {3}

    play(scenario, QueueLimits(4, 100), backend, seconds)
    assert backend.threads == [thread]


def test_what_comes_in_consecutive_turns_of_the_loop_makes_one_batch() -> None:
    """Each turn reads some of what clients have sent; whoever was read first would have a batch of its own."""
    backend = Whereabouts()

    async def scenario(variant: Variant, _: ScriptedBackend) -> None:
        async def read_in(turn: int) -> None:
            for _ in range(turn):
                await asyncio.sleep(0)
            await variant.predict(sample(1), stay)

        await asyncio.gather(*map(read_in, reversed(range(6))))

    play(scenario, QueueLimits(4, 100), backend, 1e-6)
    assert backend.ran == [4, 2]


def test_more_short_batches_than_one_are_run_by_the_loop_in_turns_that_leave_others_theirs() -> None:
    backend = Whereabouts()

    async def scenario(variant: Variant, _: ScriptedBackend) -> None:
        ran_by_then: list[int] = []
        asked = asyncio.gather(*(variant.predict(sample(1), stay) for _ in range(8)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        ran_by_then.append(len(backend.threads))
        await asked
        assert ran_by_then == [1]

    play(scenario, QueueLimits(2, 100), backend, 1e-6)
    assert (backend.ran, set(backend.threads)) == ([2] * 4, {"MainThread"})


def test_a_short_batch_waits_for_its_turn_where_all_lanes_work_and_does_not_hold_up_the_loop() -> None:
    backend = Whereabouts()

    async def scenario(variant: Variant, _: ScriptedBackend) -> None:
        leave = threading.Event()
        working = threading.Event()

        def work(lane: Lane) -> None:
            working.set()
            leave.wait(10)

        variant.running.device.post(work)
        await asyncio.to_thread(working.wait, 5)
        asked = asyncio.create_task(variant.predict(sample(1), stay))
        await asyncio.sleep(0.02)
        assert not backend.threads
        leave.set()
        await asked

    play(scenario, QueueLimits(4, 100), backend, 1e-6)
    assert backend.threads == ["device-test-0"]


def test_a_bad_row_in_a_short_batch_fails_alone_and_the_lane_is_free_again() -> None:
    async def scenario(variant: Variant, _: ScriptedBackend) -> None:
        ends = await asyncio.gather(*(variant.predict(sample(v), stay) for v in (1, -1, 2)), return_exceptions=True)
        assert [type(end) for end in ends] == [Prediction, BackendFailed, Prediction]
        assert not any(lane.held.locked() for lane in variant.running.device.lanes)

    play(scenario, QueueLimits(4, 100), seconds=1e-6)


def test_a_variant_that_turns_out_slow_is_left_to_the_lanes_but_not_for_a_single_slow_batch() -> None:
    class Slowing(Whereabouts):
        def run(self, batch: Arrays) -> Result:
            time.sleep(0.001)
            return super().run(batch)

    backend = Slowing()

    async def scenario(variant: Variant, _: ScriptedBackend) -> None:
        for value in range(100):
            await variant.predict(sample(value), stay)

    play(scenario, QueueLimits(4, 100), backend, SHORT_S / 1.5)
    assert backend.threads[:2] == ["MainThread"] * 2
    assert backend.threads[-3:] == ["device-test-0"] * 3


def play_wide(
    scenario: Callable[[Variant, ScriptedBackend, ScriptedBackend], Awaitable[None]], *, seated: bool = False
) -> None:
    """A variant on two lanes that share a backend, with a second one for a batch that has the device to itself."""
    narrow, wide = ScriptedBackend(), ScriptedBackend()
    device = Device("test", 2, 2)
    costs, alone = (Costs([CostTable(dict.fromkeys((1, 4), seconds))]) for seconds in (0.08, 0.04))
    running = LoadedVariant(device, (narrow, narrow), costs, LanePlacement(wide, alone), seated=seated)
    warm = warm_variant(running, QueueLimits(4, 100))

    act(warm, lambda variant: scenario(variant, narrow, wide), narrow.gate, wide.gate)
    assert not any(lane.held.locked() for lane in device.lanes)


def test_a_lone_batch_has_all_threads() -> None:
    async def scenario(variant: Variant, narrow: ScriptedBackend, wide: ScriptedBackend) -> None:
        for _ in range(3):
            await variant.predict(sample(1), stay)
        assert (narrow.ran, wide.ran) == ([], [1, 1, 1])

    play_wide(scenario)


@pytest.mark.parametrize("seated", [True, False])
def test_threads_that_have_places_leave_only_the_first_lane_free(seated: bool) -> None:  # noqa: FBT001
    async def scenario(variant: Variant, narrow: ScriptedBackend, wide: ScriptedBackend) -> None:
        device, ticket = variant.running.device, Ticket[Any](sample(1), None)
        ticket.bucket = 0
        places = WideLanes(variant.running)
        for lane, expected in zip(device.lanes, (wide, narrow if seated else wide), strict=True):
            assert places.place(lane, [ticket], ticket.enqueued_at).way.backend is expected
            lane.held.acquire()
            device.give_back(lane)

    play_wide(scenario, seated=seated)


def test_what_comes_during_a_wide_batch_waits_for_it_and_then_has_a_lane_each() -> None:
    async def scenario(variant: Variant, narrow: ScriptedBackend, wide: ScriptedBackend) -> None:
        wide.gate.clear()
        first = asyncio.create_task(variant.predict(sample(1), stay))
        await asyncio.to_thread(wide.started.wait, 5)
        rest = [asyncio.create_task(variant.predict(sample(1), stay)) for _ in range(7)]
        await asyncio.sleep(0.05)  # longer than one that counts as alone may wait
        assert not narrow.started.is_set()
        assert all(lane.due_at for lane in variant.running.device.lanes)
        wide.gate.set()
        await asyncio.gather(first, *rest)
        assert (wide.ran, sorted(narrow.ran)) == ([1], [3, 4])

    play_wide(scenario)


def test_a_bad_row_in_a_wide_batch_fails_alone() -> None:
    async def scenario(variant: Variant, narrow: ScriptedBackend, wide: ScriptedBackend) -> None:
        ends = await asyncio.gather(*(variant.predict(sample(v), stay) for v in (1, -1, 2)), return_exceptions=True)
        assert [type(end) for end in ends] == [Prediction, BackendFailed, Prediction]
        assert not any(lane.due_at for lane in variant.running.device.lanes)

    play_wide(scenario)
