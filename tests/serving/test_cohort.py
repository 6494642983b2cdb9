"""For whom a lane waits, and how long: on a clock of the test, and with clients that ask again."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from leanserve.serving.batch_runner import CompletedBatch, PendingResult
from leanserve.serving.batcher import QueueLimits, Ticket
from leanserve.serving.cohort import SHARE, TICK_S, Cohort
from leanserve.serving.variant import Variant
from scripted import ScriptedBackend, Slow, play, sample, stay


def answered(requests: int, seconds: float) -> CompletedBatch:
    """One batch of so many requests of one row that ran for so long."""
    ticket: Ticket[PendingResult] = Ticket((np.zeros(1),), None)  # type: ignore[arg-type]
    return CompletedBatch([ticket] * requests, [()] * requests, requests, seconds)


@pytest.mark.parametrize(
    ("requests", "seconds", "waiting", "later", "pause"),
    [
        (4, 1.0, 1, 0.0, SHARE),
        (4, 1.0, 3, 0.5 * SHARE, 0.5 * SHARE),
        (4, 1.0, 4, 0.0, 0.0),
        (4, 1.0, 1, SHARE, 0.0),
        (9, 1.0, 8, 0.0, 0.0),
        (1, 1.0, 1, 0.0, 0.0),
        (4, 0.9 * TICK_S / SHARE, 1, 0.0, 0.0),
    ],
    ids=["first back", "some", "all", "waited for", "a full batch", "alone", "too short a batch"],
)
def test_a_group_is_waited_for(requests: int, seconds: float, waiting: int, later: float, pause: float) -> None:
    group = Cohort(most=8)
    assert group.pause(1, 100.0) == 0.0
    group.answered([answered(requests, seconds)], 0, 100.0)
    assert group.pause(waiting, 100.0 + later) == pytest.approx(pause)


def test_who_came_meanwhile_belongs_to_the_group() -> None:
    group = Cohort(most=8)
    group.answered([answered(2, 1.0)], 2, 100.0)
    assert group.pause(3, 100.0) == pytest.approx(SHARE)
    assert group.pause(4, 100.0) == 0.0


def test_clients_that_were_answered_together_are_answered_together_again() -> None:
    backend = Slow(0.1)

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

    play(scenario, QueueLimits(4, 100), Slow(0.1), 0.1)


def test_a_lane_that_comes_back_takes_who_waits_together_with_those_it_has_just_answered() -> None:
    backend = Slow(0.1)

    async def scenario(variant: Variant, _: ScriptedBackend) -> None:
        async def client(begin: float) -> None:
            await asyncio.sleep(begin)
            for _ in range(2):
                await variant.predict(sample(1), stay)

        await asyncio.gather(client(0), client(0), client(0.05))

    play(scenario, QueueLimits(4, 100), backend, 0.1)
    assert backend.ran == [2, 3, 1], "not 2, 1, 2, 1: the third one waits for the two"
