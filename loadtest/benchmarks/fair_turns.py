"""What variants get of a device that they share, and how long requests wait there, measured on the real scheduler.

    python -m loadtest.benchmarks.fair_turns [--seconds 10]

The batches sleep for as long as they are said to take, so that other programs on the machine and the speed of a network
have no part in it; queues, lanes, admission and the event loop are the service's own. Requests come at a steady rate,
whatever becomes of those before. Printed are two tables of Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvloop

from leanserve.contracts import Arrays, ModelSpec, Result, TensorSpec
from leanserve.errors import DeadlineUnreachable, QueueFull, QueueTimeout
from leanserve.runtime.costs import Costs, CostTable
from leanserve.runtime.device import Device
from leanserve.runtime.lanes import LoadedVariant
from leanserve.serving.batcher import QueueLimits
from leanserve.serving.opening import WarmVariant
from leanserve.serving.variant import Variant
from leanserve.telemetry.observations import VariantFacts, VariantMetrics

SPEC = ModelSpec((TensorSpec("x", "float32", (2,)),), (TensorSpec("y", "float32", (2,)),))
ROW: Arrays = (np.zeros((1, 2), np.float32),)
ROWS = 2
"""Rows of a full batch; one takes as long."""
LIGHT_S, HOT_S = 0.0006, 0.1
TRIO = ((0.1, 1.0), (0.03, 1.0), (0.01, 1.0), (0.02, 2.0))
"""Hot variants: seconds per batch, and share of the device."""
BOUNDS: dict[str, Callable[[float], dict[str, Any]]] = {
    "as deadlines of 2 s allow": lambda _: {"timeout_s": 2.0},
    "rows for 4 s of a fifth of the lanes": lambda batch_s: {"queue_rows": round(4 / 5 * 2 * ROWS / batch_s)},
}


@dataclass(frozen=True)
class Load:
    """A variant, and what is asked of it: requests per second as a multiple of what the whole device could answer."""

    name: str
    batch_s: float
    rate: float
    share: float = 1.0
    timeout_s: float = 10.0
    queue_rows: int = 10_000


@dataclass
class Seen:
    """What became of the requests."""

    seconds: list[float] = field(default_factory=list)
    """In all, of those that were answered."""
    queued: list[tuple[float, float]] = field(default_factory=list)
    """When these came, and how long they were in the queue."""
    advised: list[tuple[float, float]] = field(default_factory=list)
    """When others found the queue full, and after how long they were told to try again."""
    refused: int = 0
    late: int = 0

    def advice_by_wait(self) -> list[float]:
        """What the refused were told, by what the next one who was let in has waited."""
        waits = sorted(self.queued)
        nexts = ((told, next((wait for at, wait in waits if at >= when), None)) for when, told in self.advised)
        return [told / wait for told, wait in nexts if wait]


class Sleeping:
    """A `contracts.Backend` whose batches take so long."""

    name, device, self_contained, row_buckets = "sleeping", "cpu", False, ()

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def run(self, batch: Arrays) -> Result:
        time.sleep(self._seconds)
        return Result(batch)

    def close(self) -> None:
        """Nothing is held."""


@contextmanager
def _served(loads: Sequence[Load], lanes: int) -> Iterator[dict[str, Variant]]:
    """The variants side by side on one device, on the running loop."""
    device = Device("cpu", lanes, lanes)
    variants = {}
    for load in loads:
        costs = Costs([CostTable(dict.fromkeys((1, ROWS), load.batch_s))])
        running = LoadedVariant(device, (Sleeping(load.batch_s),) * lanes, costs)
        limits = QueueLimits(ROWS, load.queue_rows, timeout_s=load.timeout_s)
        warm = WarmVariant(load.name, SPEC, None, running, limits, device_share=load.share)  # type: ignore[arg-type]
        variants[load.name] = Variant(warm, VariantMetrics(load.name, VariantFacts()))
    for variant in variants.values():
        variant.neighbours = [other for other in variants.values() if other is not variant]
    try:
        yield variants
    finally:
        device.close()


async def _ask(variant: Variant, seen: Seen) -> None:
    began = time.perf_counter()
    try:
        prediction = await variant.predict(ROW, lambda: False)
    except QueueFull as error:
        seen.advised.append((began, error.retry_after_s or 0.0))
        seen.refused += 1
    except DeadlineUnreachable:
        seen.refused += 1
    except QueueTimeout:
        seen.late += 1
    else:
        seen.seconds.append(time.perf_counter() - began)
        seen.queued.append((began, prediction.queue_s))


async def _ask_steadily(variant: Variant, rate: float, end: float) -> Seen:
    seen, tasks = Seen(), []
    due = time.perf_counter()
    while due < end:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(_ask(variant, seen)))
        due += 1 / rate
    await asyncio.gather(*tasks)
    return seen


async def flood(loads: Sequence[Load], lanes: int, seconds: float) -> tuple[dict[str, Seen], dict[str, float]]:
    """What requests met, and each variant's part of the seconds that the lanes worked."""
    with _served(loads, lanes) as variants:
        end = time.perf_counter() + seconds
        rates = [load.rate * ROWS / load.batch_s * lanes for load in loads]
        seen = await asyncio.gather(
            *(_ask_steadily(variant, rate, end) for variant, rate in zip(variants.values(), rates, strict=True))
        )
        for variant in variants.values():
            variant.metrics.catch_up()
        had = {name: variant.metrics.lane_s for name, variant in variants.items()}
    parts = {name: each / sum(had.values()) for name, each in had.items()}
    return dict(zip(variants, seen, strict=True)), parts


def _light(overload: float, lanes: int, seconds: float) -> Seen:
    light = Load("light", LIGHT_S, 20 * LIGHT_S / ROWS / lanes)
    loads = [light, Load("hot", HOT_S, overload)] if overload else [light]
    return uvloop.run(flood(loads, lanes, seconds))[0]["light"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    given = parser.parse_args(arguments)
    print("| lanes | neighbour | light: p50 ms | p99 ms | 429 | 504 |\n|---|---|---|---|---|---|")
    for lanes in (1, 2):
        for overload, told in ((0.0, "none"), (10.0, f"batches of {HOT_S * 1000:.0f} ms, 10 times too many")):
            seen = _light(overload, lanes, given.seconds)
            p50, p99 = (float(1000 * np.percentile(seen.seconds, share)) for share in (50, 99))
            print(f"| {lanes} | {told} | {p50:.1f} | {p99:.1f} | {seen.refused} | {seen.late} |", flush=True)
    print(
        "\n| queue | variant | part | answered | 429 | 504 | advised by waited: median (5 to 95 %) |\n"
        + 7 * "|---"
        + "|"
    )
    for bound, keys in BOUNDS.items():
        loads = [Load(f"{1000 * s:.0f} ms, share {share:g}", s, 0.8, share, **keys(s)) for s, share in TRIO]
        seen_of, parts = uvloop.run(flood(loads, 2, given.seconds))
        for name, seen in seen_of.items():
            advice = seen.advice_by_wait() or [float("nan")]
            low, middle, high = np.percentile(advice, (5, 50, 95))
            counts = f"{len(seen.seconds)} | {seen.refused} | {seen.late}"
            print(
                f"| {bound} | {name} | {parts[name]:.3f} | {counts} | {middle:.2f} ({low:.2f} to {high:.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
