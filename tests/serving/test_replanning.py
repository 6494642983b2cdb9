"""A fleet that is planned anew: what stays, what is opened, what is closed, and what a failure leaves as it was."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterable

import numpy as np
import pytest

from leanserve.contracts import Arrays, ModelSpec, Result, TensorSpec
from leanserve.errors import NotFound
from leanserve.runtime.device import Device
from leanserve.serving import fleet as fleet_module
from leanserve.serving.fleet import Fleet
from leanserve.serving.opening import BatchLimits, TrafficPlan, VariantPlan, WarmFleet
from leanserve.serving.replanning import FleetPlan, VariantSource
from leanserve.serving.short_batches import SHORT_S
from leanserve.serving.traffic import TrafficRules
from leanserve.telemetry.observations import VariantFacts
from scripted import NoCodec

SPEC = ModelSpec((TensorSpec("x", "float32", (2,)),), (TensorSpec("y", "float32", (2,)),))
ROW = (np.ones((1, 2), np.float32),)


class Base:
    name = "fake"
    spec = SPEC
    codec = NoCodec()
    caveats = ()


class ScalingBackend:
    """Multiplies its input; can be held."""

    name = "scaling"
    self_contained = False
    device = "cpu"
    row_buckets: tuple[int, ...] = ()

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.gate = threading.Event()
        self.gate.set()
        self.closed = 0

    def run(self, batch: Arrays) -> Result:
        assert not self.closed
        assert self.gate.wait(20)
        time.sleep(2 * SHORT_S)  # work for a lane: the loop must not wait at the gate
        return Result((batch[0] * np.float32(self.factor),))

    def close(self) -> None:
        self.closed += 1


class Place:
    """A fleet, and all backends that were ever opened for it."""

    def __init__(self) -> None:
        self.opened: list[ScalingBackend] = []
        warm = WarmFleet(Base(), [plan("a"), plan("b")], Device("cpu", 1))  # type: ignore[arg-type]
        for name, factor in (("a", 2), ("b", 3)):
            warm.open(name, self.source(factor).read())
        self.fleet = Fleet(warm)

    def source(self, factor: float) -> VariantSource:
        def open_it(_: int) -> ScalingBackend:
            self.opened.append(ScalingBackend(factor))
            return self.opened[-1]

        return VariantSource(lambda: open_it)

    async def replan(self, plans: Iterable[VariantPlan], **weights: float) -> None:
        plans = list(plans)
        factors = {"a": 2, "b": 3, "c": 5}
        sources = {item.name: self.source(factors[item.name]) for item in plans if item.facts.state == "serving"}
        await self.fleet.replan(FleetPlan(plans, TrafficPlan(TrafficRules(weights)), sources), lambda: None)

    async def ask(self, name: str | None) -> float:
        prediction = await self.fleet.choose(name, None).predict(ROW, lambda: False)
        return float(prediction.outputs[0][0, 0])


def plan(name: str, content: str = "", **batch: float) -> VariantPlan:
    return VariantPlan(name, batch=BatchLimits(**batch), content=content)  # type: ignore[arg-type]


def play(scenario: Callable[[Place], Awaitable[None]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "GRACE_S", 0.05)

    async def body() -> None:
        place = Place()
        try:
            await scenario(place)
        finally:
            place.fleet.close()

    asyncio.run(asyncio.wait_for(body(), 20))


async def until(happened: Callable[[], bool]) -> None:
    while not happened():
        await asyncio.sleep(0.005)


def test_what_is_planned_as_it_is_stays_and_the_others_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(place: Place) -> None:
        first, second = place.opened
        before = place.fleet.opened["a"]
        await place.replan([plan("c"), plan("a")], a=1, c=3)
        assert place.fleet.opened["a"] is before
        assert list(place.fleet.plans) == list(place.fleet.variants) == ["c", "a"]
        assert place.fleet.weights == {"c": 3, "a": 1}
        assert (await place.ask("a"), await place.ask("c")) == (2, 5)
        with pytest.raises(NotFound, match="there are c, a"):
            place.fleet.choose("b", None)
        await until(lambda: second.closed == 1)
        assert (first.closed, len(place.opened)) == (0, 3)
        await until(lambda: "b" not in place.fleet.metrics.variants)

    play(scenario, monkeypatch)


def test_another_model_of_the_same_name_takes_over_and_its_numbers_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(place: Place) -> None:
        old = place.fleet.choose("a", None)
        metrics = old.metrics
        place.opened[0].gate.clear()
        waiting = asyncio.create_task(place.ask("a"))
        await asyncio.sleep(0.02)
        await place.replan([plan("a", "other"), plan("b")])
        assert place.fleet.confirm(old, "a", None) is old, "it was chosen before, and is answered by whom it was chosen"
        place.opened[0].gate.set()
        assert await waiting == 2
        await until(lambda: place.opened[0].closed == 1)
        new = place.fleet.opened["a"]
        assert place.fleet.confirm(old, "a", None) is new
        assert new is not old
        assert new.metrics is metrics
        assert await place.ask("a") == 2
        assert new.backend is place.opened[2]

    play(scenario, monkeypatch)


def test_another_queue_keeps_the_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(place: Place) -> None:
        await place.replan([plan("a", queue_rows=7), plan("b")])
        assert place.fleet.opened["a"].batcher.limits.queue_rows == 7
        assert await place.ask("a") == 2
        await asyncio.sleep(0.2)  # longer than the one before is kept
        assert [backend.closed for backend in place.opened] == [0, 0]
        assert await place.ask("a") == 2

    play(scenario, monkeypatch)


def test_a_variant_that_fails_its_gate_now_is_closed_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(place: Place) -> None:
        poor = VariantPlan("b", VariantFacts(state="excluded", reason="too poor"))
        await place.replan([plan("a"), poor])
        assert place.fleet.status_of["b"] == ("excluded", "too poor")
        await until(lambda: place.opened[1].closed == 1)
        await place.replan([plan("a"), plan("b")])
        assert await place.ask("b") == 3

    play(scenario, monkeypatch)


def test_what_a_client_has_unloaded_stays_unloaded_and_is_closed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(place: Place) -> None:
        await place.fleet.unload("b")
        await place.replan([plan("a"), plan("b")])
        assert place.fleet.status_of["b"].state == "unloaded"
        await place.fleet.load("b")
        assert await place.ask("b") == 3
        await place.fleet.unload("b")
        await place.replan([plan("a")])
        await asyncio.sleep(0.2)
        assert [backend.closed for backend in place.opened] == [0, 1, 1]
        assert "b" not in place.fleet.metrics.variants

    play(scenario, monkeypatch)


def test_where_one_cannot_be_opened_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(place: Place) -> None:
        def broken() -> Callable[[int], ScalingBackend]:
            raise RuntimeError("no such file")

        sources = {"c": place.source(5), "a": VariantSource(broken)}
        planned = FleetPlan([plan("c"), plan("a", "other")], TrafficPlan(), sources)
        with pytest.raises(RuntimeError, match="no such file"):
            await place.fleet.replan(planned, lambda: pytest.fail("nothing was swapped"))
        assert list(place.fleet.plans) == list(place.fleet.variants) == ["a", "b"]
        assert [backend.closed for backend in place.opened] == [0, 0, 1]
        assert (await place.ask("a"), await place.ask("b")) == (2, 3)

    play(scenario, monkeypatch)


def test_costs_are_foreseen_by_what_the_build_has_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(place: Place) -> None:
        def measured(name: str, content: str, milliseconds: float) -> VariantPlan:
            return VariantPlan(name, VariantFacts(quality={"latency_ms": {1: milliseconds, 8: 8.0}}), content=content)

        await place.replan([measured("a", "", 2.0), measured("b", "", 2.0)])
        known = place.fleet.opened["a"].costs.table()
        await place.replan([measured("a", "", 2.0), measured("c", "", 6.0)])
        foreseen = place.fleet.opened["c"].costs.table()
        assert foreseen[1] == pytest.approx(3 * known[1])
        assert foreseen[8] == pytest.approx(known[8])

    play(scenario, monkeypatch)
