"""`leanserve bench`: all serving variants side by side in one run, as long as you like, in ratios."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

from rich.console import Console
from rich.progress import track
from rich.table import Table

from leanserve.evaluation.interleaved_benchmark import Latencies, examples, interleaved
from leanserve.runtime.device import Lane
from leanserve.serving.opening import WarmFleet

ROUND_S = 0.1


def run_bench(warm: WarmFleet, sizes: Sequence[int], seconds: float) -> Latencies:
    """Latencies of every serving variant, about `seconds` for each at each batch size, on all lanes of the device.

    They are seconds of the device per batch: a lane's, divided by the number of lanes that run batches side by side.
    Sizes for which a variant has no memory are left out.
    """
    rounds = max(3, round(seconds / ROUND_S))
    batches = {name: examples(variant.spec, sizes) for name, variant in warm.variants.items()}
    limits = {name: variant.running.memory_rows or max(sizes) for name, variant in warm.variants.items()}
    timings = []
    for lane in warm.device.lanes:
        backends = {name: variant.running.backends[lane.index] for name, variant in warm.variants.items()}
        timings.append(interleaved(backends, batches, ROUND_S, limits, partial(_seat, warm, lane)))
    for _ in track(range(rounds), "measuring", transient=True):
        by_lane = warm.device.call_on_each(lambda lane: next(timings[lane.index]))
    return {
        name: {
            rows: [
                1 / sum(1 / s for s in of_lanes)
                for of_lanes in zip(*(lane[name][rows] for lane in by_lane), strict=True)
            ]
            for rows in (len(batch[0]) for batch in batches[name])
            if all(rows in lane[name] for lane in by_lane)
        }
        for name in warm.variants
    }


def _seat(warm: WarmFleet, lane: Lane, name: str) -> None:
    """As where the variant serves."""
    warm.device.seat(lane, seated=warm.variants[name].running.seated)


def print_bench(latencies: Latencies, console: Console, caveats: Sequence[str] = ()) -> None:
    """One row per variant: rows per second, and the median ratio to the first variant, by batch size."""
    first = next(iter(latencies.values()))
    sizes = sorted({rows for by_rows in latencies.values() for rows in by_rows})
    title = "rows per second, and gain over the first variant (interleaved)"
    table = Table("variant", title=title, caption=", ".join(caveats) or None, caption_style="yellow")
    for rows in sizes:
        table.add_column(f"batch {rows}", justify="right")
        table.add_column("gain", justify="right")
    for name, by_rows in latencies.items():
        cells: list[str] = []
        for rows in sizes:
            cells += _cells(rows, by_rows.get(rows), first.get(rows))
        table.add_row(name, *cells)
    console.print(table)


def _cells(rows: int, ours: Sequence[float] | None, theirs: Sequence[float] | None) -> tuple[str, str]:
    """Rows per second, and the gain; a dash where a variant has no memory for so many rows."""
    if ours is None:
        return "–", "–"
    speed = f"{rows / statistics.median(ours):.0f}"
    if theirs is None:
        return speed, "–"
    gain = statistics.median(first / second for second, first in zip(ours, theirs, strict=True))
    return speed, f"{gain:.2f}x"
