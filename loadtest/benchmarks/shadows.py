"""What experiments cost those who are served meanwhile, and after how many pairs they are decided.

    python -m loadtest.benchmarks.shadows [--seconds 10] [--turns 6]

Batches sleep for 5 ms, so that other programs on the machine have little part in it; queues, lanes, shadows, looks,
verdict and ramp are the service's own. Requests come at a steady rate of 50 a second; to saturate it, 32 clients ask
again as soon as they are answered. Turns with an experiment that answers all batches again alternate with others.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvloop

from leanserve.config.experiment_section import ExperimentConfig
from leanserve.contracts import Arrays, Json, ModelSpec, Result, TensorSpec
from leanserve.live.asked import EndWish, StartWish
from leanserve.live.director import Director
from leanserve.live.documents import experiment_document
from leanserve.runtime.device import Device
from leanserve.serving.fleet import Fleet
from leanserve.serving.opening import BatchLimits, VariantPlan, WarmFleet

SPEC = ModelSpec(
    (TensorSpec("x", "float32", (4,)),), (TensorSpec("y", "float32", (4,), meaning="logits"),), tuple("abcd")
)
BATCH_S, RATE, CLIENTS = 0.005, 50.0, 32
CANDIDATES = {"worse": (1.0, 0.05), "slower": (1.5, 0.0), "equal": (1.0, 0.0)}
"""By name: times the base's seconds, and the share of rows that it answers otherwise."""
STAY = StartWish(candidate="equal", stages=(1.0,), min_stage_s=3600.0)


class SleepingClassifier:
    """A `contracts.Backend` that answers what it is asked, mostly, after so many seconds."""

    name, device, self_contained, row_buckets = "sleeping", "cpu", False, ()

    def __init__(self, factor: float, wrong: float) -> None:
        self._seconds, self._wrong = factor * BATCH_S, wrong
        self._random = np.random.default_rng(0)

    def run(self, batch: Arrays) -> Result:
        time.sleep(self._seconds)
        wrong = self._random.random(len(batch[0])) < self._wrong
        return Result((np.where(wrong[:, None], batch[0][:, ::-1], batch[0]),))

    def close(self) -> None:
        """Nothing is held."""


def sleeping(factor: float, wrong: float, _: object) -> SleepingClassifier:
    """The backend of any lane."""
    return SleepingClassifier(factor, wrong)


@asynccontextmanager
async def directed() -> AsyncIterator[Director]:
    """A fleet of the base and all candidates, and who runs experiments on it."""
    codec = SimpleNamespace(media_types=())
    base: Any = SimpleNamespace(name="sleeping", spec=SPEC, codec=codec, caveats=())
    variants = {"base": (1.0, 0.0), **CANDIDATES}
    plans = [VariantPlan(name, batch=BatchLimits(max_rows=4, timeout_s=60.0)) for name in variants]
    warm = WarmFleet(base, plans, Device("cpu", 1))
    for name, faults in variants.items():
        warm.open(name, partial(sleeping, *faults))
    fleet = Fleet(warm)
    director = Director(fleet, ExperimentConfig(), None, lambda *_: None)
    try:
        yield director
    finally:
        await director.close()
        fleet.close()


async def ask(fleet: Fleet) -> float:
    """Seconds that one request of a random row took."""
    began = time.perf_counter()
    await fleet.choose(None, None).predict((np.random.random((1, 4)).astype(np.float32),), lambda: False)
    return time.perf_counter() - began


async def steadily(fleet: Fleet, seconds: float) -> list[float]:
    """Latencies of requests at a steady rate."""
    tasks, due = [], time.perf_counter()
    end = due + seconds
    while due < end:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(fleet)))
        due += 1 / RATE
    return list(await asyncio.gather(*tasks))


async def saturated(fleet: Fleet, seconds: float) -> list[float]:
    """Latencies of clients that ask again at once."""
    end = time.perf_counter() + seconds

    async def client() -> list[float]:
        taken = []
        while time.perf_counter() < end:
            taken.append(await ask(fleet))
        return taken

    return [taken for each in await asyncio.gather(*(client() for _ in range(CLIENTS))) for taken in each]


async def side_by_side(load: Any, seconds: float, turns: int) -> tuple[list[list[float]], list[list[float]], Json]:
    """Latencies by turn without and with an experiment, and what became of the batches to answer again."""
    seen: tuple[list[list[float]], list[list[float]]] = ([], [])
    counted: dict[str, int] = {}
    async with directed() as director:
        for turn in range(2 * turns):
            if turn % 2:
                await director.start(STAY, "benchmark")
            seen[turn % 2].append(await load(director.fleet, seconds))
            if turn % 2:
                assert director.shadows is not None
                for outcome, count in director.shadows.outcomes.items():
                    counted[outcome] = counted.get(outcome, 0) + count
                await director.abort(EndWish(), "benchmark")
    return *seen, counted


async def decided(candidate: str) -> Json:
    """The experiment of a candidate, over; at a tenth of the device's time, to be there sooner."""
    async with directed() as director:
        wish = StartWish(candidate=candidate, shadow_time=0.1, min_stage_s=5.0)
        await director.start(wish, "benchmark")
        while director.running is not None:
            await steadily(director.fleet, 0.5)
        return experiment_document(director, None)["experiment"]


def _told(title: str, without: list[list[float]], within: list[list[float]], counted: Json) -> None:
    cells = []
    for share in (0.5, 0.95, 0.99):
        ours, theirs = ([float(np.quantile(turn, share)) for turn in turns] for turns in (within, without))
        ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
        cells.append(
            f"{1000 * np.median(theirs):.1f} | {np.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    answered = sum(map(len, within)) / sum(map(len, without))
    print(f"| {title} | {' | '.join(cells)} | {answered:.3f} | {counted} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print two tables of Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a turn")
    parser.add_argument("--turns", type=int, default=6, help="of each kind")
    given = parser.parse_args(arguments)
    print(
        "| load | p50 ms | times with | p95 ms | times with | p99 ms | times with | answered, times | batches |\n"
        f"{9 * '|---'}|"
    )
    _told("50 a second", *uvloop.run(side_by_side(steadily, given.seconds, given.turns)))
    _told("saturated", *uvloop.run(side_by_side(saturated, given.seconds, given.turns)))
    print(f"\n| candidate | state | pairs | timed | s | reason |\n{6 * '|---'}|")
    for name in CANDIDATES:
        began = time.monotonic()
        told = uvloop.run(decided(name))
        counts = f"{told['counts']['pairs']['rows']:.0f} | {told['counts']['base']['timed']:.0f}"
        took = time.monotonic() - began
        print(f"| {name} | {told['state']} | {counts} | {took:.0f} | {told['reason']} |", flush=True)


if __name__ == "__main__":
    main()
