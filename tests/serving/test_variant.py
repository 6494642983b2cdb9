"""A request to a variant, from its ticket to its answer, refusal or failure."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import numpy as np
import pytest

from leanserve.contracts import Array, Arrays, Result
from leanserve.errors import BackendFailed, BadInput, ClientGone, QueueTimeout
from leanserve.serving.batch_runner import Prediction
from leanserve.serving.batcher import QueueLimits
from leanserve.serving.variant import Variant
from scripted import ScriptedBackend, hold, play, sample, stay


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


@pytest.mark.parametrize("answer", [lambda x: x[:-1], lambda x: np.concatenate([x, x])], ids=["too few", "too many"])
def test_a_wrong_number_of_rows_is_a_failure_of_that_batch(answer: Callable[[Array], Array]) -> None:
    class Miscounting(ScriptedBackend):
        def run(self, batch: Arrays) -> Result:
            (doubled,) = super().run(batch).outputs
            return Result((answer(doubled),) if (batch[0] == 5).any() else (doubled,))

    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        first = await hold(variant, backend)
        tasks = [asyncio.create_task(variant.predict(sample(i), stay)) for i in range(8)]
        await asyncio.sleep(0)
        backend.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await first
        assert [type(result) for result in results] == [Prediction] * 5 + [BackendFailed] + [Prediction] * 2

    play(scenario, QueueLimits(8, 100), Miscounting())


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


def test_a_full_batch_does_not_wait_for_the_end_of_the_delay() -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        started = time.perf_counter()
        await asyncio.gather(*(variant.predict(sample(1), stay) for _ in range(4)))
        assert time.perf_counter() - started < 1
        assert backend.ran == [4]

    play(scenario, QueueLimits(4, 100, max_delay_s=5.0))


def test_values_that_only_the_model_finds_wrong_are_a_bad_input_of_that_request_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class LookUp(ScriptedBackend):
        def run(self, batch: Arrays) -> Result:
            if (batch[0] == 99).any():
                raise BadInput("there are 99 rows to look up")
            return super().run(batch)

    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        first = await hold(variant, backend)
        tasks = [asyncio.create_task(variant.predict(sample(value), stay)) for value in (1, 99, 2, 3)]
        await asyncio.sleep(0)
        backend.gate.set()
        replies = await asyncio.gather(*tasks, return_exceptions=True)
        await first
        assert isinstance(replies[1], BadInput)
        assert [reply.outputs[0][0, 0] for reply in replies if isinstance(reply, Prediction)] == [2, 4, 6]

    play(scenario, QueueLimits(4, 100), LookUp())
    assert caplog.text == ""
