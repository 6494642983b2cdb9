"""`leanserve bench`: all serving variants side by side in one run, as long as you like, in ratios."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.progress import track
from rich.table import Table

from service.compression.race import Latencies, interleaved
from service.serving.fleet import Fleet

ROUND_S = 0.1


def run_bench(fleet: Fleet, sizes: Sequence[int], seconds: float) -> Latencies:
    """Latencies of every serving variant, about `seconds` for each at each batch size, on the fleet's device thread."""
    backends = {name: variant.backend for name, variant in fleet.variants.items()}
    rounds = max(3, round(seconds / ROUND_S))
    timing = interleaved(backends, [fleet.base.spec.example(rows) for rows in sizes], rounds, ROUND_S)
    for _ in track(range(rounds), "measuring", transient=True):
        latencies = fleet.device.call(lambda: next(timing))
    return latencies


def print_bench(latencies: Latencies, console: Console) -> None:
    """One row per variant: rows per second, and the median ratio to the first variant, by batch size."""
    first = next(iter(latencies.values()))
    table = Table("variant", title="rows per second, and gain over the first variant (interleaved)")
    for rows in first:
        table.add_column(f"batch {rows}", justify="right")
        table.add_column("gain", justify="right")
    for name, by_rows in latencies.items():
        cells = []
        for rows, seconds in by_rows.items():
            gain = statistics.median(theirs / ours for ours, theirs in zip(seconds, first[rows], strict=True))
            cells += [f"{rows / statistics.median(seconds):.0f}", f"{gain:.2f}x"]
        table.add_row(name, *cells)
    console.print(table)
