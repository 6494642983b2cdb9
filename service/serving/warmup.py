"""Loading a variant on every lane of its device, and running it in every shape it will meet before a client does.

What a batch costs is measured with all lanes at work, because that is how they work under load: two lanes share caches
and memory bandwidth, and each is slower than one that has the machine to itself.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable

from service.contracts import Arrays, Backend, InputSpec
from service.serving.costs import CostTable, buckets_up_to
from service.serving.device import Device, Lane
from service.serving.execution import Running

WARM_RUNS = 3
WARM_SECONDS = 0.15
"""Per batch bucket: at least one run after the first, at most this many runs or seconds."""


def warm_up(device: Device, load: Callable[[], Backend], spec: InputSpec, max_rows: int) -> Running:
    """Load, run and measure on every lane.

    Raises:
        Exception: whatever loading or running raises.
    """
    loading = threading.Lock()

    def open_on(_: Lane) -> Backend:
        with loading:  # loading and the first runs, which may compile, use settings of the whole process
            backend = load()
            for rows in buckets_up_to(max_rows, backend.row_buckets):
                backend.run(spec.example(rows))
            return backend

    backends = tuple(device.call_on_each(open_on))
    buckets = buckets_up_to(max_rows, backends[0].row_buckets)
    seconds = {}
    for rows in buckets:
        seconds[rows] = _seconds_together(device, backends, spec.example(rows))
    return Running(device, backends, CostTable(seconds))


def _seconds_together(device: Device, backends: tuple[Backend, ...], batch: Arrays) -> float:
    """Seconds of one lane for the batch while all others run it, too."""
    return statistics.fmean(device.call_on_each(lambda lane: _seconds(backends[lane.index], batch)))


def _seconds(backend: Backend, batch: Arrays) -> float:
    best, spent = float("inf"), 0.0
    for _ in range(WARM_RUNS):
        started = time.perf_counter()
        backend.run(batch)
        took = time.perf_counter() - started
        best, spent = min(best, took), spent + took
        if spent > WARM_SECONDS:
            break
    return best
