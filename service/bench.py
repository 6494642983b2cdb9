"""`leanserve bench`: all variants side by side in one run, because machines drift and only ratios can be trusted.

Rounds are interleaved: every variant runs a little in each round, so that a slow minute hits all of them alike.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from functools import partial

from rich.console import Console
from rich.progress import track
from rich.table import Table

from service.contracts import Arrays, Backend
from service.serving.fleet import Fleet

ROUND_S = 0.1


@dataclass
class Timing:
    """Seconds per batch of one variant at one batch size, one median per round."""

    variant: str
    rows: int
    rounds: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Rows per second, median over rounds."""
        return self.rows / statistics.median(self.rounds)

    def gain(self, reference: Timing) -> float:
        """How many times the reference's throughput, as the median of the ratios round by round."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.rounds, reference.rounds, strict=True))


def run_bench(fleet: Fleet, sizes: tuple[int, ...], seconds: float) -> list[list[Timing]]:
    """For each batch size, the timings of every variant in config order; all run on the fleet's device thread."""
    timings = [[Timing(name, rows) for name in fleet.variants] for rows in sizes]
    rounds = max(3, round(seconds / ROUND_S))
    for _ in track(range(rounds), "measuring", transient=True):
        for row in timings:
            batch = fleet.base.spec.example(row[0].rows)
            for timing in row:
                backend = fleet.variants[timing.variant].backend
                timing.rounds.append(fleet.device.call(partial(_round, backend, batch)))
    return timings


def print_bench(timings: list[list[Timing]], console: Console) -> None:
    """One row per variant: rows per second and gain over the first variant, by batch size."""
    table = Table("variant", title="rows per second, and gain over the first variant (interleaved)")
    for row in timings:
        table.add_column(f"batch {row[0].rows}", justify="right")
        table.add_column("gain", justify="right")
    for index, first in enumerate(timings[0]):
        cells = [(row[index], row[0]) for row in timings]
        table.add_row(
            first.variant, *(text for ours, ref in cells for text in (f"{ours.rate:.0f}", f"{ours.gain(ref):.2f}x"))
        )
    console.print(table)


def _round(backend: Backend, batch: Arrays) -> float:
    samples: list[float] = []
    end = time.perf_counter() + ROUND_S
    while not samples or time.perf_counter() < end:
        started = time.perf_counter()
        backend.run(batch)
        samples.append(time.perf_counter() - started)
    return statistics.median(samples)
