"""What is answered again takes idle time alone, a little of it, and gives way first."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from leanserve.contracts import Arrays, Result
from leanserve.live import rerun
from live_arms import QUICK, Arm, Arms, play

STAY = {"candidate": "b", "stages": [1.0], "min_stage_s": 3600}
ONE_BY_ONE = {"max_rows": 1, "timeout_ms": 20_000}


def test_while_requests_wait_nothing_is_answered_again() -> None:
    async def scene(arms: Arms) -> None:
        await arms.verb("POST", "/start", STAY)
        ran = arms.backends["b"].ran
        replies = await asyncio.gather(*(arms.ask() for _ in range(60)))
        assert {reply.json()["model_version"] for reply in replies} == {"a"}
        shadows = arms.service.experiments.shadows
        assert shadows is not None
        assert shadows.outcomes["busy"] >= 55
        assert arms.backends["b"].ran - ran <= 2
        while shadows.outcomes["compared"] + shadows.outcomes["busy"] < 60:
            await asyncio.sleep(0.01)

    # Slow enough that requests come faster than they are answered, on any machine.
    play(scene, {"a": Arm(seconds=0.02), "b": Arm()}, batch=ONE_BY_ONE)


def shadowed(arms: Arms) -> dict[str, Any]:
    shadows = arms.service.experiments.shadows
    assert shadows is not None
    return {**shadows.outcomes, "waiting": shadows.waiting, "time_share": shadows.time_share}


class Caches:
    """A clock by which a batch takes three times as long after one of another arm, which has the caches."""

    def __init__(self) -> None:
        self.now = 0.0
        self.filled_by: object = None

    def perf_counter(self) -> float:
        return self.now

    def run(self, arm: object) -> None:
        self.now += 0.002 if self.filled_by is arm else 0.006
        self.filled_by = arm


@dataclass
class Cached(Arm):
    """Takes as long as that clock says."""

    caches: Caches = field(default_factory=Caches)

    def run(self, batch: Arrays) -> Result:
        self.caches.run(self)
        return super().run(batch)


def test_twins_take_as_long_whichever_is_asked_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = Caches()

    async def scene(arms: Arms) -> None:
        await arms.verb("POST", "/start", STAY)
        while shadowed(arms)["compared"] < 10:
            await arms.ask()
            await asyncio.sleep(0.01)
        while (counts := (await arms.experiment())["counts"])["candidate"]["timed"] < 10:
            await asyncio.sleep(0.05)
        for arm in ("base", "candidate"):
            assert counts[arm]["device_ms_per_row"] == pytest.approx(2.0)

    monkeypatch.setattr(rerun, "time", caches)
    play(scene, {"a": Cached(caches=caches), "b": Cached(caches=caches)}, batch=ONE_BY_ONE)


@pytest.mark.parametrize(("seconds", "times"), [(0.0002, 2), (0.03, 1)], ids=["quick", "slow"])
def test_quick_batches_are_run_twice_and_slow_ones_once(seconds: float, times: int) -> None:
    async def scene(arms: Arms) -> None:
        await arms.verb("POST", "/start", STAY)
        ran = arms.backends["b"].ran
        for _ in range(4):
            await arms.ask()
            await asyncio.sleep(5 * seconds)
        while shadowed(arms)["waiting"]:
            await asyncio.sleep(0.01)
        assert arms.backends["b"].ran - ran == times * shadowed(arms)["compared"] > 0

    play(scene, {"a": Arm(seconds=seconds), "b": Arm(seconds=seconds)}, batch=ONE_BY_ONE)


def test_what_waits_to_be_answered_again_is_bounded_and_so_is_its_time() -> None:
    async def scene(arms: Arms) -> None:
        await arms.verb("POST", "/start", STAY | {"shadow_time": 0.02})
        for _ in range(60):
            await arms.ask()
            await asyncio.sleep(0.005)
        told = shadowed(arms)
        assert told["compared"] >= 1
        assert told["full"] > told["compared"]
        assert told["waiting"] <= 3
        assert told["time_share"] < 0.06  # the first one is free

    play(scene, {"a": Arm(seconds=0.002), "b": Arm(seconds=0.002)}, experiment=QUICK | {"shadow_rows": 3})


def test_no_batch_goes_beyond_the_bytes_that_may_wait() -> None:
    async def scene(arms: Arms) -> None:
        await arms.verb("POST", "/start", STAY)
        shadows = arms.service.experiments.shadows
        assert shadows is not None
        shadows._limits = shadows._limits._replace(nbytes=10)  # a row has 16, its answer 16 more
        await arms.ask()
        assert (shadows.outcomes["full"], shadows.waiting) == (1, 0)

    play(scene, {"a": Arm(), "b": Arm()})


def test_a_share_of_the_batches_is_taken_and_none_after_the_end() -> None:
    async def scene(arms: Arms) -> None:
        await arms.verb("POST", "/start", STAY | {"shadow_share": 0.5})
        for _ in range(80):
            await arms.ask()
        told = shadowed(arms)
        assert 15 < told["compared"] + told["waiting"] + told["busy"] + told["full"] < 65
        await arms.verb("POST", "/abort")
        assert shadowed(arms)["waiting"] == 0
        ran = arms.backends["b"].ran
        await arms.ask()
        await asyncio.sleep(0.05)
        assert arms.backends["b"].ran - ran <= 1
        assert all(variant.observer is None for variant in arms.service.fleet.variants.values())

    play(scene, {"a": Arm(), "b": Arm()})


def test_a_candidate_that_goes_away_is_not_waited_for_and_one_that_is_replaced_ends_the_experiment() -> None:
    async def scene(arms: Arms) -> None:
        await arms.verb("POST", "/start", STAY)
        await arms.service.fleet.unload("b")
        await arms.ask()
        await asyncio.sleep(0.05)
        assert shadowed(arms)["unfit"] == 1
        assert (await arms.experiment())["state"] == "running"
        await arms.service.fleet.load("b")
        plans = arms.service.fleet.plans
        arms.service.fleet.plans = {name: plan for name, plan in plans.items() if name != "b"}
        arms.service.fleet._tell()
        told = await arms.experiment()
        assert (told["state"], told["reason"]) == ("aborted", "the variant 'b' is not there any more")
        arms.service.fleet.plans = plans

    play(scene, {"a": Arm(), "b": Arm()})


def test_a_candidate_that_has_failed_is_out() -> None:
    async def scene(arms: Arms) -> None:
        await arms.verb("POST", "/start", STAY)
        arms.service.fleet._enter("b", "failed", "a batch of it did not end")
        told = await arms.experiment()
        assert (told["state"], told["share"]) == ("aborted", 0.0)
        assert told["reason"] == "the variant 'b' has failed: a batch of it did not end"

    play(scene, {"a": Arm(), "b": Arm()})
