"""Who is let in and who is refused at the door, by the time that they would wait."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from leanserve.errors import BackendFailed, DeadlineUnreachable, QueueFull, ServiceError
from leanserve.serving.batcher import QueueLimits
from leanserve.serving.variant import Variant
from scripted import ScriptedBackend, hold, play, sample, stay


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


@pytest.mark.parametrize(
    ("limits", "expected"),
    [(QueueLimits(4, 8), QueueFull), (QueueLimits(4, 100, timeout_s=1.5), DeadlineUnreachable)],
    ids=["full", "too long"],
)
def test_a_variant_says_that_it_is_closed_before_it_is_given_anything(
    limits: QueueLimits, expected: type[ServiceError]
) -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        variant.check_open()
        first = await hold(variant, backend)
        variant.check_open()
        tasks = [asyncio.create_task(variant.predict(sample(i), stay)) for i in range(8)]
        await asyncio.sleep(0)
        with pytest.raises(expected) as refusal:
            variant.check_open()
        assert refusal.value.retry_after_s is not None
        assert 0 < refusal.value.retry_after_s <= 3.0
        backend.gate.set()
        await asyncio.gather(first, *tasks, return_exceptions=True)
        variant.check_open()

    play(scenario, limits, seconds=1.0)


def test_what_is_being_decoded_counts_as_waiting() -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        first = await hold(variant, backend)
        with ExitStack() as decoded:
            for _ in range(4):
                decoded.enter_context(variant.expecting())
            with pytest.raises(DeadlineUnreachable), variant.expecting():
                pass
            await asyncio.sleep(0)
            second = asyncio.create_task(variant.predict(sample(1), stay))  # what is decoded takes the next place
            await asyncio.sleep(0)
            assert variant.waiting_rows() == 1
        variant.check_open()
        backend.gate.set()
        await asyncio.gather(first, second)

    play(scenario, QueueLimits(4, 100, timeout_s=1.3), seconds=lambda rows: rows / 4)


def test_what_is_being_decoded_does_not_close_a_variant_for_the_more_urgent() -> None:
    async def scenario(variant: Variant, _: ScriptedBackend) -> None:
        with ExitStack() as decoded:
            for _each in range(5):
                decoded.enter_context(variant.expecting())
            with pytest.raises(DeadlineUnreachable):
                variant.check_open()
            variant.check_open(1)
            decoded.enter_context(variant.expecting(None))  # is taken for one of the default
            variant.check_open(1)

    play(scenario, QueueLimits(4, 100, timeout_s=1.3, levels=2, default_level=2), seconds=lambda rows: rows / 4)


def test_a_variant_may_be_closed_for_the_default_and_open_for_a_more_urgent_request() -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        first = await hold(variant, backend)
        tasks = [asyncio.create_task(variant.predict(sample(i), stay, priority=2)) for i in range(8)]
        await asyncio.sleep(0)
        for closed in ({}, {"priority": 2}, {"priority": 1, "timeout_s": 0.1}):
            with pytest.raises(DeadlineUnreachable):
                variant.check_open(**closed)
        variant.check_open(1)
        variant.check_open(None)  # which may turn out to be 1
        backend.gate.set()
        await asyncio.gather(first, *tasks, return_exceptions=True)

    play(scenario, QueueLimits(4, 100, timeout_s=1.5, levels=2, default_level=2), seconds=1.0)


def test_admission_counts_what_is_left_of_the_batch_that_runs() -> None:
    async def scenario(variant: Variant, backend: ScriptedBackend) -> None:
        assert variant.wait_s(level=1) == 0.0
        first = await hold(variant, backend)
        assert 0.5 < variant.wait_s(level=1) <= 1.0
        with pytest.raises(DeadlineUnreachable):
            await variant.predict(sample(1), stay, timeout_s=0.2)
        backend.gate.set()
        await first
        assert variant.wait_s(level=1) == 0.0
        with pytest.raises(BackendFailed):
            await variant.predict(sample(-1), stay)
        assert variant.wait_s(level=1) == 0.0

    play(scenario, QueueLimits(4, 100), seconds=1.0)
