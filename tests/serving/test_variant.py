"""A variant between a real event loop and a real device thread, with a backend that does as it is told."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from service.contracts import Array, Arrays, Field, InputSpec
from service.errors import (
    BackendFailed,
    BadInput,
    ClientGone,
    DeadlineUnreachable,
    QueueFull,
    QueueTimeout,
    ServiceError,
)
from service.serving.batcher import Batcher, QueueLimits
from service.serving.costs import Costs, CostTable
from service.serving.device import Device, Lane
from service.serving.execution import Prediction, Reply, Running, Way
from service.serving.variant import SHORT_S, Variant
from service.telemetry.observations import VariantFacts, VariantMetrics

SPEC = InputSpec((Field("x", "float32", (2,)),), (Field("y", "float32", (2,)),))


class ScriptedBackend:
    """Doubles its input; waits at a gate, refuses batches with a negative value, remembers the rows it ran."""

    name = "scripted"
    self_contained = False

    def __init__(self, row_buckets: tuple[int, ...] = ()) -> None:
        self.row_buckets = row_buckets
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.ran: list[int] = []

    def run(self, batch: Arrays) -> Arrays:
        self.started.set()
        assert self.gate.wait(10)
        if (batch[0] < 0).any():
            raise ValueError("negative")
        self.ran.append(len(batch[0]))
        return (batch[0] * 2,)

    def close(self) -> None: ...


def sample(value: float, rows: int = 1) -> Arrays:
    return (np.full((rows, 2), value, np.float32),)


def stay() -> bool:
    return False


Scenario = Callable[[Variant, ScriptedBackend], Awaitable[None]]


def play(
    scenario: Scenario,
    limits: QueueLimits,
    backend: ScriptedBackend | None = None,
    seconds: float = 0.001,
    lanes: int = 1,
) -> Variant:
    """Run a scenario against a variant whose every batch is believed to cost `seconds`; all lanes share the backend."""
    backend = backend or ScriptedBackend()
    device = Device("test", lanes, lanes)
    costs = Costs([CostTable(dict.fromkeys((1, 2, limits.max_rows), seconds))])
    variant = Variant("v", SPEC, Running(device, (backend,) * lanes, costs), Batcher[Reply](limits))

    async def body() -> None:
        variant.bind(asyncio.get_running_loop(), VariantMetrics("v", VariantFacts()), [])
        await scenario(variant, backend)

    try:
        asyncio.run(asyncio.wait_for(body(), 20))
    finally:
        backend.gate.set()
        device.close()
    return variant


async def hold(variant: Variant, backend: ScriptedBackend) -> asyncio.Task[Prediction]:
    """Keep the device busy with one request until the gate is opened."""
    backend.gate.clear()
    task = asyncio.create_task(variant.predict(sample(100), stay))
    await asyncio.to_thread(backend.started.wait, 5)
    return task


def test_a_burst_behind_a_busy_device_becomes_full_batches_and_each_gets_its_own_answer() -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        first = await hold(variant, backend)
        tasks = [asyncio.create_task(variant.predict(sample(i), stay)) for i in range(10)]
        await asyncio.sleep(0)
        backend.gate.set()
        predictions = await asyncio.gather(*tasks)
        await first
        assert backend.ran == [1, 4, 4, 2]
        assert [prediction.outputs[0][0, 0] for prediction in predictions] == [2 * i for i in range(10)]
        assert [prediction.batch_size for prediction in predictions] == [4] * 8 + [2] * 2
        assert all(prediction.queue_s > 0 for prediction in predictions)

    variant = play(scenario, QueueLimits(4, 100))
    assert variant.metrics.rows.total == 11
    assert variant.metrics.rows.count == 4


def test_an_urgent_request_is_run_before_those_that_wait() -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        first = await hold(variant, backend)
        order: list[int] = []

        async def ask(priority: int) -> None:
            await variant.predict(sample(1), stay, priority=priority)
            order.append(priority)

        tasks = [asyncio.create_task(ask(priority)) for priority in (3, 0, 1)]
        await asyncio.sleep(0)
        backend.gate.set()
        await asyncio.gather(first, *tasks)
        assert order == [1, 0, 3]

    play(scenario, QueueLimits(1, 100, levels=3, default_level=2))


def test_admission_counts_only_what_goes_before_the_request() -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        first = await hold(variant, backend)
        waiting = [asyncio.create_task(variant.predict(sample(1), stay, priority=2)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(DeadlineUnreachable):
            await variant.predict(sample(1), stay, timeout_s=1.5, priority=3)
        urgent = asyncio.create_task(variant.predict(sample(1), stay, timeout_s=1.5, priority=1))
        await asyncio.sleep(0)
        backend.gate.set()
        await asyncio.gather(first, urgent, *waiting)

    play(scenario, QueueLimits(2, 100, levels=3, default_level=2), seconds=1.0)


def test_a_large_request_is_split_and_rejoined_in_order() -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        rows = (np.arange(18, dtype=np.float32).reshape(9, 2),)
        prediction = await variant.predict(rows, stay)
        np.testing.assert_array_equal(prediction.outputs[0], rows[0] * 2)
        assert backend.ran == [4, 4, 1]

    play(scenario, QueueLimits(4, 100))


def test_one_bad_row_fails_alone_and_the_variant_goes_on() -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        first = await hold(variant, backend)
        tasks = [asyncio.create_task(variant.predict(sample(-1 if i == 5 else i), stay)) for i in range(8)]
        await asyncio.sleep(0)
        backend.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await first
        assert [type(result) for result in results] == [Prediction] * 5 + [BackendFailed] + [Prediction] * 2
        assert "negative" not in str(results[5])  # the log has the details, the client an id
        assert (await variant.predict(sample(3), stay)).outputs[0][0, 0] == 6

    play(scenario, QueueLimits(8, 100))


def test_a_client_that_left_is_not_executed() -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        first = await hold(variant, backend)
        left = asyncio.create_task(variant.predict(sample(1), lambda: True))
        cancelled = asyncio.create_task(variant.predict(sample(2), stay))
        kept = asyncio.create_task(variant.predict(sample(3), stay))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.sleep(0)
        backend.gate.set()
        await first
        assert (await kept).outputs[0][0, 0] == 6
        with pytest.raises(ClientGone):
            await left
        assert sum(backend.ran) == 2

    play(scenario, QueueLimits(8, 100))


def test_waiting_too_long_is_told_while_the_device_is_still_busy() -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        first = await hold(variant, backend)
        with pytest.raises(QueueTimeout, match="longer than its timeout"):
            await variant.predict(sample(1), stay, timeout_s=0.05)
        assert not first.done()
        assert variant.waiting_rows() == 0
        backend.gate.set()
        await first
        assert backend.ran == [1]

    play(scenario, QueueLimits(8, 100))


@pytest.mark.parametrize(
    ("limits", "timeout_s", "expected"),
    [(QueueLimits(4, 8), None, QueueFull), (QueueLimits(4, 100), 1.5, DeadlineUnreachable)],
)
def test_refused_at_the_door_with_the_time_after_which_to_retry(
    limits: QueueLimits, timeout_s: float | None, expected: type[ServiceError]
) -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        first = await hold(variant, backend)
        tasks = [asyncio.create_task(variant.predict(sample(i), stay)) for i in range(8)]
        await asyncio.sleep(0)
        with pytest.raises(expected) as refusal:
            await variant.predict(sample(1), stay, timeout_s)
        assert refusal.value.retry_after_s is not None
        assert 0 < refusal.value.retry_after_s <= 3.0  # the batch that runs and two full ones, a second each
        backend.gate.set()
        await asyncio.gather(first, *tasks)

    play(scenario, limits, seconds=1.0)


def test_admission_counts_what_is_left_of_the_batch_that_runs() -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        assert variant.wait_s(1, level=1) == 0.0
        first = await hold(variant, backend)
        assert 0.5 < variant.wait_s(1, level=1) <= 1.0
        with pytest.raises(DeadlineUnreachable):
            await variant.predict(sample(1), stay, timeout_s=0.2)
        backend.gate.set()
        await first
        assert variant.wait_s(1, level=1) == 0.0
        with pytest.raises(BackendFailed):
            await variant.predict(sample(-1), stay)
        assert variant.wait_s(1, level=1) == 0.0

    play(scenario, QueueLimits(4, 100), seconds=1.0)


def test_rows_are_padded_to_a_bucket_only_for_compiled_shapes() -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        prediction = await variant.predict(sample(1, rows=3), stay)
        assert prediction.outputs[0].shape == (3, 2)

    static, dynamic = ScriptedBackend((1, 2, 8)), ScriptedBackend()
    padded = play(scenario, QueueLimits(8, 100), static)
    play(scenario, QueueLimits(8, 100), dynamic)
    assert (static.ran, dynamic.ran, padded.metrics.padding_rows) == ([8], [3], 5)


def test_a_delay_gathers_company_on_an_idle_device_but_a_full_batch_does_not_wait() -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        lone = asyncio.create_task(variant.predict(sample(1), stay))
        await asyncio.sleep(0.02)
        await asyncio.gather(lone, variant.predict(sample(2), stay))
        assert backend.ran == [2]
        assert 0.1 <= loop.time() - started < 2
        await variant.predict(sample(3, rows=4), stay)
        assert backend.ran == [2, 4]

    play(scenario, QueueLimits(4, 100, max_delay_s=0.1))


def test_a_second_lane_runs_what_waits_while_the_first_is_busy() -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        backend.gate.clear()
        tasks = [asyncio.create_task(variant.predict(sample(i), stay)) for i in range(6)]
        async with asyncio.timeout(5):
            while variant.waiting_rows() > 2:  # both lanes hold two rows, at the same time
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        assert variant.waiting_rows() == 2
        assert variant.wait_s(2, level=1) == pytest.approx(1.0 + 1.0 / 2, abs=0.2), "two lanes drain the queue"
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

        def run(self, batch: Arrays) -> Arrays:
            order.append(self.label)
            return super().run(batch)

    async def body(device: Device) -> None:
        backends = {label: Named(label) for label in "ab"}
        variants = {}
        for label, backend in backends.items():
            running = Running(device, (backend,), Costs([CostTable({1: 0.001})]))
            variants[label] = Variant(label, SPEC, running, Batcher[Reply](QueueLimits(1, 100)))
        for variant in variants.values():
            others = [other for other in variants.values() if other is not variant]
            variant.bind(asyncio.get_running_loop(), VariantMetrics(variant.name, VariantFacts()), others)
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


@pytest.mark.parametrize("answer", [lambda x: x[:-1], lambda x: np.concatenate([x, x])], ids=["too few", "too many"])
def test_a_wrong_number_of_rows_is_a_failure_of_that_batch(answer: Callable[[Array], Array]) -> None:
    class Miscounting(ScriptedBackend):
        def run(self, batch: Arrays) -> Arrays:
            (doubled,) = super().run(batch)
            return (answer(doubled),) if (batch[0] == 5).any() else (doubled,)

    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        first = await hold(variant, backend)
        tasks = [asyncio.create_task(variant.predict(sample(i), stay)) for i in range(8)]
        await asyncio.sleep(0)
        backend.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await first
        assert [type(result) for result in results] == [Prediction] * 5 + [BackendFailed] + [Prediction] * 2

    play(scenario, QueueLimits(8, 100), Miscounting())


TOKENS = InputSpec(
    (Field("ids", "int64", (None,), pad=9),),
    (Field("tags", "int64", (None,)), Field("total", "int64", ())),
    max_length=64,
)


class Tagger:
    """Answers every token with its double, and the number of real ones; remembers the shapes it ran."""

    name = "tagger"
    self_contained = False
    row_buckets: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.started = threading.Event()
        self.shapes: list[tuple[int, ...]] = []

    def run(self, batch: Arrays) -> Arrays:
        self.started.set()
        assert self.gate.wait(10)
        self.shapes.append(batch[0].shape)
        return batch[0] * 2, (batch[0] != 9).sum(1)

    def close(self) -> None: ...


def tokens(length: int, rows: int = 1) -> Arrays:
    return (np.full((rows, length), length, np.int64),)


def play_tokens(scenario: Callable[[Variant, Tagger], Awaitable[None]]) -> Variant:
    """Length buckets to 16 of four rows, to 32 of two, to 64 of one; a batch costs as many s."""
    backend, device = Tagger(), Device("test", 1)
    costs = Costs([CostTable({rows: float(length)}) for length, rows in ((16, 4), (32, 2), (64, 1))], (16, 32, 64))
    limits = QueueLimits(4, 100, timeout_s=1000, lengths=(16, 32, 64), rows_at=(4, 2, 1))
    variant = Variant("v", TOKENS, Running(device, (backend,), costs), Batcher[Reply](limits))

    async def body() -> None:
        variant.bind(asyncio.get_running_loop(), VariantMetrics("v", VariantFacts()), [])
        await scenario(variant, backend)

    try:
        asyncio.run(asyncio.wait_for(body(), 20))
    finally:
        backend.gate.set()
        device.close()
    return variant


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
        assert variant.wait_s(1, level=1) == pytest.approx(64 + 16 + 32 + 64, abs=1)
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


def test_sweeping_a_long_queue_leaves_the_loop_to_others() -> None:
    waiting, spread_s = 3000, 0.5
    swept: list[float] = []

    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        first = await hold(variant, backend)
        expire = variant.batcher.expire

        def timed(now: float) -> object:
            started = time.perf_counter()
            found = expire(now)
            swept.append(time.perf_counter() - started)
            return found

        variant.batcher.expire = timed  # type: ignore[method-assign, assignment]
        asked = (variant.predict(sample(1), stay, 1.0 + spread_s * i / waiting) for i in range(waiting))
        ends = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(end) for end in ends] == [QueueTimeout] * waiting
        backend.gate.set()
        await first

    play(scenario, QueueLimits(4, 5000, timeout_s=100), seconds=2e-4)
    assert sum(swept) < 0.2 * spread_s, "a twentieth, and room for a busy machine"


class Whereabouts(ScriptedBackend):
    """Remembers the threads on which it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: list[str] = []

    def run(self, batch: Arrays) -> Arrays:
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
        def run(self, batch: Arrays) -> Arrays:
            time.sleep(0.001)
            return super().run(batch)

    backend = Slowing()

    async def scenario(variant: Variant, _: ScriptedBackend) -> None:
        for value in range(40):
            await variant.predict(sample(value), stay)

    play(scenario, QueueLimits(4, 100), backend, SHORT_S / 1.5)
    assert backend.threads[:2] == ["MainThread"] * 2
    assert backend.threads[-3:] == ["device-test-0"] * 3


def play_wide(scenario: Callable[[Variant, ScriptedBackend, ScriptedBackend], Awaitable[None]]) -> None:
    """A variant on two lanes that share a backend, with a second one for a batch that has the device to itself."""
    narrow, wide = ScriptedBackend(), ScriptedBackend()
    device = Device("test", 2, 2)
    costs, alone = (Costs([CostTable(dict.fromkeys((1, 4), seconds))]) for seconds in (0.08, 0.04))
    running = Running(device, (narrow, narrow), costs, Way(wide, alone))
    variant = Variant("v", SPEC, running, Batcher[Reply](QueueLimits(4, 100)))

    async def body() -> None:
        variant.bind(asyncio.get_running_loop(), VariantMetrics("v", VariantFacts()), [])
        await scenario(variant, narrow, wide)

    try:
        asyncio.run(asyncio.wait_for(body(), 20))
    finally:
        narrow.gate.set()
        wide.gate.set()
        device.close()
    assert not any(lane.held.locked() for lane in device.lanes)


def test_a_lone_batch_has_all_threads() -> None:
    async def scenario(variant: Variant, narrow: ScriptedBackend, wide: ScriptedBackend) -> None:
        for _ in range(3):
            await variant.predict(sample(1), stay)
        assert (narrow.ran, wide.ran) == ([], [1, 1, 1])

    play_wide(scenario)


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


class Slow(ScriptedBackend):
    def run(self, batch: Arrays) -> Arrays:
        time.sleep(0.1)
        return super().run(batch)


def test_clients_that_were_answered_together_are_answered_together_again() -> None:
    backend = Slow()

    async def scenario(variant: Variant, _: ScriptedBackend) -> None:
        async def client(number: int) -> None:
            for _ in range(3):
                await variant.predict(sample(1), stay)
                await asyncio.sleep(0.0005 * number)

        await asyncio.gather(*(client(number) for number in range(4)))

    play(scenario, QueueLimits(4, 100), backend, 0.1)
    assert backend.ran == [4, 4, 4]


def test_who_comes_alone_behind_a_group_waits_for_it_no_longer_than_a_little() -> None:
    async def scenario(variant: Variant, _: ScriptedBackend) -> None:
        await asyncio.gather(*(variant.predict(sample(1), stay) for _ in range(4)))
        alone = await variant.predict(sample(1), stay)
        assert alone.batch_size == 1
        assert 0.002 < alone.queue_s < 0.05
        again = await variant.predict(sample(1), stay)
        assert again.queue_s < 0.002, "who was answered alone is no group"

    play(scenario, QueueLimits(4, 100), Slow(), 0.1)


def test_a_full_batch_does_not_wait_for_the_end_of_the_delay() -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        started = time.perf_counter()
        await asyncio.gather(*(variant.predict(sample(1), stay) for _ in range(4)))
        assert time.perf_counter() - started < 1
        assert backend.ran == [4]

    play(scenario, QueueLimits(4, 100, max_delay_s=5.0))
