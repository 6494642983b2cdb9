"""What hangs is noticed: a batch on a lane, and the loop; what of it is ended, and who lives on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import pytest

from leanserve.contracts import Arrays, Result
from leanserve.errors import NotReady
from leanserve.runtime.device import BatchOnLane, Device, Lane
from leanserve.runtime.turns import DeviceShare
from leanserve.serving.fleet import Fleet
from leanserve.serving.opening import VariantPlan, WarmFleet
from leanserve.serving.variant import Variant
from leanserve.serving.watchdog import EXIT_STATUS, OnStuck, Watchdog, WatchdogLimits
from scripted import SPEC, NoCodec, ScriptedBackend, sample, stay


class Base:
    """A base of variants that are asked with arrays."""

    name, spec, codec, caveats = "base", SPEC, NoCodec(), ()


class Hanging(ScriptedBackend):
    """Hangs at its gate, for as long as a test takes, on a batch that holds a 7."""

    def run(self, batch: Arrays) -> Result:
        if (batch[0] == 7).any():
            self.started.set()
            self.gate.wait(30)
        return Result((batch[0] * 2,))


def play(scene: Callable[[Fleet, Hanging], Awaitable[None]], lanes: int) -> None:
    """Two variants, `sick` and `well`, on a device whose watchdog is patient for a tenth of a second."""
    sick = Hanging()
    sick.gate.clear()
    device = Device("test", lanes, lanes)
    warm = WarmFleet(Base(), [VariantPlan("sick"), VariantPlan("well")], device)  # type: ignore[arg-type]
    warm.open("sick", lambda _: sick)
    warm.open("well", lambda _: Hanging())
    fleets = []

    async def body() -> None:
        fleets.append(Fleet(warm, WatchdogLimits(0.1, 20.0, "isolate")))
        await scene(fleets[0], sick)

    try:
        asyncio.run(asyncio.wait_for(body(), 20))
    finally:
        sick.gate.set()
        fleets[0].close()


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not happened():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("lanes", [1, 2])
def test_the_variant_of_a_batch_that_hangs_fails_and_the_others_live(
    lanes: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(fleet: Fleet, sick: Hanging) -> None:
        stuck = asyncio.create_task(fleet.variants["sick"].predict(sample(7), stay))
        await asyncio.to_thread(sick.started.wait, 5)
        if lanes == 1:
            waiting = [asyncio.create_task(fleet.variants["sick"].predict(sample(1), stay)) for _ in range(3)]
        else:
            waiting = []
        for task in (stuck, *waiting):
            with pytest.raises(NotReady, match="'sick' has failed: a batch of it did not end"):
                await task
        assert fleet.status_of["sick"] == ("failed", "a batch of it did not end")
        with pytest.raises(NotReady, match="'sick' is failed: a batch of it did not end"):
            fleet.choose("sick", None)
        assert fleet.choose(None, None).name == "well"
        answers = await asyncio.gather(*(fleet.variants["well"].predict(sample(i), stay) for i in range(8)))
        assert [answer.outputs[0][0, 0] for answer in answers] == [2 * i for i in range(8)]
        assert (fleet.is_ready(), fleet.is_live()) == (True, True)
        assert fleet.metrics.variants["sick"].stuck_batches == 1
        sick.gate.set()  # it ends after all
        await until(lambda: "has ended after all" in caplog.text)
        again = await fleet.variants["well"].predict(sample(3), stay)
        assert again.outputs[0][0, 0] == 6

    play(scene, lanes)
    assert "a batch of variant 'sick' has run for more than 0.1 s" in caplog.text


def test_with_every_variant_failed_the_service_is_neither_ready_nor_live() -> None:
    async def scene(fleet: Fleet, sick: Hanging) -> None:
        await fleet.unload("well")
        assert fleet.is_live()
        with pytest.raises(NotReady):
            await fleet.variants["sick"].predict(sample(7), stay)
        assert not fleet.is_ready()
        assert fleet.is_live(), "'well' could be loaded"
        await fleet.load("well")
        fleet._enter("well", "failed", "so did this one")
        assert not fleet.is_live()
        with pytest.raises(NotReady, match="every variant has failed"):
            fleet.check_live()

    play(scene, 1)


def test_a_variant_that_failed_can_be_loaded_again() -> None:
    async def scene(fleet: Fleet, sick: Hanging) -> None:
        with pytest.raises(NotReady):
            await fleet.variants["sick"].predict(sample(7), stay)
        await fleet.load("sick")
        assert (await fleet.variants["sick"].predict(sample(1), stay)).outputs[0][0, 0] == 2

    play(scene, 1)


def test_with_isolation_the_loop_runs_no_batch_itself() -> None:
    class Where(Hanging):
        def run(self, batch: Arrays) -> Result:
            threads.add(threading.current_thread().name)
            return super().run(batch)

    threads: set[str] = set()
    device = Device("test", 1, 1)
    warm = WarmFleet(Base(), [VariantPlan("v")], device)  # type: ignore[arg-type]
    warm.open("v", lambda _: Where())

    async def body(limits: WatchdogLimits | None) -> set[str]:
        threads.clear()
        variant: Variant = Fleet(warm, limits).variants["v"]
        await variant.predict(sample(1), stay)
        return set(threads)

    assert asyncio.run(body(WatchdogLimits(on_stuck="isolate"))) == {"device-test-0"}
    assert asyncio.run(body(WatchdogLimits(on_stuck="exit"))) == {"MainThread"}
    device.close()


def test_a_hanging_batch_ends_the_process_where_that_is_wanted(caplog: pytest.LogCaptureFixture) -> None:
    ended: list[int] = []

    async def body() -> None:
        lane = device.lanes[0]
        watchdog = Watchdog(device, WatchdogLimits(0.1, 20.0, "exit"), lambda *_: pytest.fail("isolated"), ended.append)
        lane.batch = BatchOnLane(DeviceShare("tiny"), None)
        await until(lambda: bool(ended))
        await asyncio.sleep(0.1)
        lane.batch = None
        watchdog.stop()

    device = Device("test", 1)
    asyncio.run(body())
    device.close()
    assert ended == [EXIT_STATUS]
    assert "variant 'tiny' has run for more than 0.1 s: the process ends with status 70" in caplog.text


@pytest.mark.parametrize("on_stuck", ["exit", "isolate"])
def test_a_loop_that_does_not_turn_ends_the_process(on_stuck: OnStuck, caplog: pytest.LogCaptureFixture) -> None:
    ended: list[int] = []

    async def body() -> None:
        watchdog = Watchdog(
            device, WatchdogLimits(20.0, 0.1, on_stuck), lambda *_: pytest.fail("isolated"), ended.append
        )
        await asyncio.sleep(0.3)
        assert not ended, "it turns"
        device.lanes[0].batch = BatchOnLane(DeviceShare("tiny"), None)
        give_up = time.monotonic() + 5
        while not ended and time.monotonic() < give_up:
            time.sleep(0.01)
        watchdog.stop()

    device = Device("test", 1)
    asyncio.run(body())
    device.close()
    assert ended == [EXIT_STATUS]
    assert "has not turned for 0.1 s; batches of tiny are running" in caplog.text


def test_batches_that_end_in_time_are_let_alone() -> None:
    async def body() -> None:
        isolated = list[Lane]()
        watchdog = Watchdog(
            device, WatchdogLimits(0.2, 20.0, "isolate"), lambda lane, _: isolated.append(lane), lambda _: None
        )
        for _ in range(40):
            device.lanes[0].batch = BatchOnLane(DeviceShare("v"), None)
            await asyncio.sleep(0.01)
        watchdog.stop()
        assert not isolated

    device = Device("test", 1)
    asyncio.run(body())
    device.close()
