"""Variants that are unloaded and loaded again while others serve: who answers meanwhile, what the lanes notice."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from leanserve.contracts import Arrays, ModelSpec, Result, TensorSpec
from leanserve.errors import BadInput, NotFound, NotReady, ServiceError
from leanserve.runtime.device import Device
from leanserve.serving.batch_runner import Prediction
from leanserve.serving.fleet import Fleet
from leanserve.serving.opening import TrafficPlan, VariantPlan, WarmFleet
from leanserve.serving.short_batches import SHORT_S
from leanserve.serving.traffic import TrafficRules
from leanserve.telemetry.observations import VariantFacts
from scripted import NoCodec

SPEC = ModelSpec((TensorSpec("x", "float32", (2,)),), (TensorSpec("y", "float32", (2,)),))
ROW = (np.ones((1, 2), np.float32),)
WEIGHTS = {"a": 2, "b": 1, "c": 1}


class Base:
    name = "fake"
    spec = SPEC
    codec = NoCodec()
    caveats = ()


class Backends:
    """Opens backends that double their input, on which thread each ran and was closed; can be held and be broken."""

    def __init__(self) -> None:
        self.opened: list[DoublingBackend] = []
        self.gate = threading.Event()
        self.gate.set()
        self.held = threading.Event()
        self.broken = ""

    def load(self, threads: int) -> DoublingBackend:
        if self.broken:
            raise RuntimeError(self.broken)
        self.pass_gate()
        self.opened.append(DoublingBackend(self))
        return self.opened[-1]

    def pass_gate(self) -> None:
        if not self.gate.is_set():
            self.held.set()
            assert self.gate.wait(20)


class DoublingBackend:
    name = "doubling"
    self_contained = False
    device = "cpu"
    row_buckets: tuple[int, ...] = ()

    def __init__(self, owner: Backends) -> None:
        self.owner = owner
        self.ran: list[tuple[str, int]] = []
        self.closed = False

    def run(self, batch: Arrays) -> Result:
        self.owner.pass_gate()
        assert not self.closed
        time.sleep(2 * SHORT_S)  # work for a lane
        self.ran.append((threading.current_thread().name, len(batch[0])))
        return Result((batch[0] * 2,))

    def close(self) -> None:
        self.closed = True


Scenario = Callable[[Fleet, dict[str, Backends]], Awaitable[None]]


def play(scenario: Scenario, lanes: int = 1) -> None:
    plans = [VariantPlan(name) for name in "abc"]
    plans.append(VariantPlan("poor", VariantFacts(state="excluded", reason="too poor")))
    warm = WarmFleet(Base(), plans, Device("cpu", lanes, lanes), TrafficPlan(TrafficRules(WEIGHTS)))  # type: ignore[arg-type]
    backends = {name: Backends() for name in "abc"}
    for name in "abc":
        warm.open(name, backends[name].load)

    async def body() -> None:
        fleet = Fleet(warm)
        try:
            await scenario(fleet, backends)
        finally:
            fleet.close()

    asyncio.run(asyncio.wait_for(body(), 20))


async def ask(fleet: Fleet, name: str | None, key: str | None = None) -> Prediction:
    prediction = await fleet.choose(name, key).predict(ROW, lambda: False)
    assert prediction.outputs[0].tolist() == [[2, 2]]
    return prediction


def shown(fleet: Fleet) -> str:
    """The state of `b` in the metrics."""
    return fleet.metrics.variants["b"].facts.state


async def until(happened: Callable[[], bool]) -> None:
    while not happened():
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("lanes", [1, 2])
def test_an_unloaded_variant_is_closed_and_a_loaded_one_goes_on_where_it_stopped(lanes: int) -> None:
    async def scenario(fleet: Fleet, backends: dict[str, Backends]) -> None:
        variant = fleet.variants["b"]
        await ask(fleet, "b")
        costs, first = variant.costs.table(), backends["b"].opened[:]
        await fleet.unload("b")
        assert all(backend.closed for backend in first)
        with pytest.raises(NotReady, match="variant 'b' is unloaded"):
            fleet.choose("b", None)
        assert shown(fleet) == "unloaded"
        await fleet.load("b")
        await ask(fleet, "b")
        await asyncio.sleep(0)  # batches are counted after their replies
        assert len(backends["b"].opened) == 2 * lanes
        assert not any(backend.closed for backend in backends["b"].opened[lanes:])
        assert fleet.variants["b"].metrics.requests is variant.metrics.requests, "counters go on"
        variant.metrics.catch_up()
        assert variant.metrics.rows.count == 2
        assert variant.costs.table().keys() == costs.keys()
        assert shown(fleet) == "serving"
        assert list(fleet.variants) == list(fleet.weights) == ["a", "b", "c"]

    play(scenario, lanes)


def test_the_lanes_have_no_part_in_loading_and_only_shapes_that_occur_are_warmed() -> None:
    async def scenario(fleet: Fleet, backends: dict[str, Backends]) -> None:
        await fleet.unload("b")
        await fleet.load("b")
        knee = fleet.variants["b"].batcher.limits.max_rows
        sizes = [size for size in fleet.variants["b"].costs.tables[0].buckets if size <= knee]
        for backend in backends["b"].opened[2:]:
            assert backend.ran == [("loading-low", size) for size in sizes]
        at_start = {thread for backend in backends["b"].opened[:2] for thread, _ in backend.ran}
        assert at_start == {"device-cpu-0", "device-cpu-1"}

    play(scenario, lanes=2)


def test_others_are_answered_while_a_variant_is_loaded() -> None:
    async def scenario(fleet: Fleet, backends: dict[str, Backends]) -> None:
        usual = sys.getswitchinterval()
        await fleet.unload("b")
        backends["b"].gate.clear()
        loading = asyncio.create_task(fleet.load("b"))
        await until(backends["b"].held.is_set)
        assert fleet.status_of["b"].state == shown(fleet) == "loading"
        with pytest.raises(NotReady, match="variant 'b' is loading"):
            fleet.choose("b", None)
        again = asyncio.create_task(fleet.load("b"))
        assert {(await ask(fleet, None)).variant for _ in range(50)} == {"a", "c"}
        assert sys.getswitchinterval() < usual
        backends["b"].gate.set()
        await asyncio.gather(loading, again)
        assert len(backends["b"].opened) == 2, "loaded once at the start, once now"
        assert sys.getswitchinterval() == usual

    play(scenario)


def test_the_queue_is_finished_before_the_backend_is_closed() -> None:
    async def scenario(fleet: Fleet, backends: dict[str, Backends]) -> None:
        backends["b"].gate.clear()
        waiting = [asyncio.create_task(ask(fleet, "b")) for _ in range(100)]
        await until(backends["b"].held.is_set)
        late = fleet.choose("b", None)
        sent = asyncio.create_task(
            late.predict(ROW, lambda: False)
        )  # chosen in this turn of the loop, queued in the next
        unloading = asyncio.create_task(fleet.unload("b"))
        await asyncio.sleep(0.02)
        assert fleet.status_of["b"].state == "unloading"
        assert not backends["b"].opened[0].closed
        waiting[-1].cancel()
        backends["b"].gate.set()
        done = await asyncio.gather(*waiting, sent, return_exceptions=True)
        assert sum(isinstance(item, Prediction) for item in done) == 100
        await unloading
        assert backends["b"].opened[0].closed

    play(scenario)


def test_who_was_chosen_before_is_chosen_again_where_it_is_gone() -> None:
    async def scenario(fleet: Fleet, _: dict[str, Backends]) -> None:
        variant = fleet.choose("b", None)
        assert fleet.confirm(variant, None, None) is variant
        await fleet.unload("b")
        assert fleet.confirm(variant, None, None).name in {"a", "c"}
        with pytest.raises(NotReady):
            fleet.confirm(variant, "b", None)
        await fleet.load("b")
        assert fleet.confirm(variant, "b", None) is variant

    play(scenario)


def test_the_traffic_of_an_unloaded_variant_goes_to_the_others_and_nobody_else_is_moved() -> None:
    async def scenario(fleet: Fleet, _: dict[str, Backends]) -> None:
        keys = [str(number) for number in range(400)]
        before = {key: fleet.choose(None, key).name for key in keys}
        await fleet.unload("b")
        during = {key: fleet.choose(None, key).name for key in keys}
        assert all(during[key] == before[key] for key in keys if before[key] != "b")
        moved = [during[key] for key in keys if before[key] == "b"]
        assert 0.5 < moved.count("a") / len(moved) < 0.85
        assert moved.count("a") + moved.count("c") == len(moved)
        assert fleet.weights == {"a": 2, "c": 1}
        await fleet.load("b")
        assert {key: fleet.choose(None, key).name for key in keys} == before

    play(scenario)


def test_the_last_variant_is_not_unloaded_by_name_but_with_all() -> None:
    async def scenario(fleet: Fleet, backends: dict[str, Backends]) -> None:
        await fleet.unload("a")
        await fleet.unload("b")
        await fleet.unload("b")  # is not loaded: nothing to do
        with pytest.raises(BadInput, match="'c' is the last one that serves"):
            await fleet.unload("c")
        await ask(fleet, None)
        await fleet.unload()
        for name, key in ((None, None), (None, "key"), ("c", None)):
            with pytest.raises(NotReady):
                fleet.choose(name, key)
        with pytest.raises(NotReady, match="no variant of 'fake' is loaded"):
            fleet.check_ready()
        await fleet.load()
        fleet.check_ready()
        assert list(fleet.variants) == ["a", "b", "c"]
        assert [len(item.opened) for item in backends.values()] == [2, 2, 2]

    play(scenario)


def test_a_variant_that_cannot_be_loaded_stays_unloaded_with_the_reason_and_can_be_tried_again() -> None:
    async def scenario(fleet: Fleet, backends: dict[str, Backends]) -> None:
        await fleet.unload("b")
        backends["b"].broken = "file is gone"
        with pytest.raises(ServiceError, match="'b' could not be loaded: file is gone"):
            await fleet.load("b")
        with pytest.raises(NotReady, match="variant 'b' is unloaded: it could not be loaded: file is gone"):
            fleet.choose("b", None)
        assert fleet.metrics.variants["b"].facts.reason == "it could not be loaded: file is gone"
        await ask(fleet, "a")
        backends["b"].broken = ""
        await fleet.load("b")
        await ask(fleet, "b")

    play(scenario)


def test_loading_all_goes_on_after_one_that_fails() -> None:
    async def scenario(fleet: Fleet, backends: dict[str, Backends]) -> None:
        await fleet.unload()
        backends["b"].broken = "file is gone"
        with pytest.raises(ServiceError, match="'b' could not be loaded"):
            await fleet.load()
        assert list(fleet.variants) == ["a", "c"]

    play(scenario)


def test_what_was_opened_is_closed_where_warming_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(fleet: Fleet, backends: dict[str, Backends]) -> None:
        await fleet.unload("b")
        with monkeypatch.context() as patched:
            patched.setattr(DoublingBackend, "run", lambda *_: 1 / 0)
            with pytest.raises(ServiceError, match="division by zero"):
                await fleet.load("b")
        assert all(backend.closed for backend in backends["b"].opened)

    play(scenario, lanes=2)


def test_a_swap_is_finished_though_nobody_waits_for_it_any_more() -> None:
    async def scenario(fleet: Fleet, backends: dict[str, Backends]) -> None:
        await fleet.unload("b")
        backends["b"].gate.clear()
        loading = asyncio.create_task(fleet.load("b"))
        await until(backends["b"].held.is_set)
        loading.cancel()
        backends["b"].gate.set()
        await until(lambda: "b" in fleet.variants)
        await ask(fleet, "b")

    play(scenario)


def test_what_is_no_variant_was_excluded_or_is_asked_while_draining_is_refused() -> None:
    async def scenario(fleet: Fleet, _: dict[str, Backends]) -> None:
        for swap in (fleet.load, fleet.unload):
            with pytest.raises(NotFound, match="no variant 'x'; there are a, b, c, poor"):
                await swap("x")
            with pytest.raises(NotReady, match="variant 'poor' is excluded: too poor"):
                await swap("poor")
        await fleet.unload("c")
        fleet.draining = True
        assert {(await ask(fleet, None)).variant for _ in range(50)} == {"a", "b"}, "draining is still serving"
        for swap in (fleet.load, fleet.unload):
            with pytest.raises(NotReady, match="draining"):
                await swap("b")
        assert list(fleet.variants) == ["a", "b"]

    play(scenario)


def test_neighbours_count_in_admission_only_while_they_are_loaded() -> None:
    async def scenario(fleet: Fleet, _: dict[str, Backends]) -> None:
        await fleet.unload("b")
        assert [other.name for other in fleet.variants["a"].neighbours] == ["c"]
        await fleet.load("b")
        assert [other.name for other in fleet.variants["a"].neighbours] == ["b", "c"]
        assert [other.name for other in fleet.variants["b"].neighbours] == ["a", "c"]

    play(scenario)
