"""Loading a variant for every lane of its device, and running it in every shape it will meet before a client does.

What a batch costs is measured with all lanes at work, because that is how they work under load: two lanes share caches
and memory bandwidth, and each is slower than one that has the machine to itself. Where backends allow it, there is also
one with all threads of the device, for a batch that is alone there.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal, TypeVar

from leanserve.contracts import Arrays, Backend, ModelSpec
from leanserve.memory import forget, is_out_of_memory
from leanserve.runtime.assembly import dynamic_axes
from leanserve.runtime.costs import Costs, CostTable, buckets_up_to, length_buckets, rate
from leanserve.runtime.device import Device, Lane
from leanserve.runtime.lanes import LanePlacement, LoadedVariant
from leanserve.runtime.linux.denormals import flush_denormals
from leanserve.runtime.unused_memory import give_back
from leanserve.timing import take_turns, timed

_Outcome = TypeVar("_Outcome")

WIDE_GAIN = 1.1
"""A backend with all threads is kept if it answers a lone row at least this many times as soon as one of a lane."""
WARM_RUNS = 5
WARM_SECONDS = 0.02
"""Per shape: until there are this many runs or seconds. The first counts only if it took so long itself."""
TINY_S = 0.0003
"""Below that the best of several runs counts, not their median: lanes that measure at once wait for each other's Python
longer than they run."""
NEAR, LEAST_ROUNDS, ROUNDS, ROUNDS_SECONDS = 0.85, 1, 6, 0.8
"""Batches that may be the knee are measured again in turns, so that the machine's moods meet all of them alike. All
variants of a service share the seconds."""
SPARSE_ROWS = (1, 4, 16)
"""Where lengths vary, these rows and the maximum are measured; what lies between is interpolated."""
GRID_SECONDS, GRID_SECONDS_PER_LENGTH = 0.6, 0.3
"""No larger batch is tried than fits into that. Single rows, and what was compiled, are measured anyway."""


def warm_up(
    device: Device,
    load: Callable[[int], Backend],
    spec: ModelSpec,
    max_rows: int,
    variants: int = 1,
    *,
    seated: bool = False,
) -> LoadedVariant:
    """Load (with that number of threads), run and measure on every lane one of so many `variants`.

    It is measured as it will be run: `seated` as `LoadedVariant` has it.

    Batches for which memory runs out are left out, and so are all larger ones.

    Raises:
        Exception: whatever loading or running raises; of a lack of memory only that for the smallest batch.
    """
    memory = _Memory()
    lengths = length_buckets(spec.max_length) if dynamic_axes(spec.inputs) else ()
    loading = threading.Lock()
    opened: list[Backend] = []

    def open_with(threads: int) -> Backend:
        backend = load(threads)
        length = min(lengths, default=0)
        for rows in buckets_up_to(max_rows, backend.row_buckets) if backend.row_buckets else (1,):
            memory.attempt(rows, length, partial(backend.run, spec.example(rows, length)))
        return backend

    def open_on(lane: Lane) -> Backend:
        flush_denormals()
        with loading:  # loading and the first runs, which may compile, use settings of the whole process
            if not opened or not opened[0].self_contained:
                opened.append(open_with(lane.threads))
            return opened[-1]

    backends = tuple(device.call_on_each(open_on))
    rows = _row_buckets(backends[0], max_rows, lengths)

    def measured(one: Callable[[Backend, Arrays], float], rows: int, length: int = 0) -> float | None:
        batch = spec.example(rows, length)

        def on_lane(lane: Lane) -> float:
            device.seat(lane, seated=seated)
            return one(backends[lane.index], batch)

        run = partial(device.call_on_each, on_lane)
        return memory.attempt(rows, length, lambda: statistics.fmean(run()))

    seconds = partial(measured, _seconds)
    shapes: Literal["any", "compiled"] = "compiled" if backends[0].row_buckets else "any"
    if shapes == "compiled" and not lengths:
        grid = [{count: taken for count in rows if (taken := seconds(count, 0)) is not None}]
    else:
        grid = measure_grid(seconds, rows, lengths or (0,))
    if not lengths:
        compare_again(partial(measured, _timed), grid[0], ROUNDS_SECONDS / variants)
    costs = Costs([CostTable(known, max_rows, shapes) for known in grid], lengths)
    widens = opened[0].self_contained and opened[0].device == "cpu"  # of a GPU every lane has all
    wide = _wide(device, open_with, spec, costs, seated=seated) if widens else None
    give_back()  # batches beyond the knee were tried, and none of them comes again
    return LoadedVariant(device, backends, costs, wide, memory.largest(grid, lengths or (0,)), seated=seated)


class _Memory:
    """For how many rows there is memory, which only a run tells."""

    def __init__(self) -> None:
        self._lacking: dict[int, int] = {}
        """Length -> rows of the smallest batch for which there was none."""

    def attempt(self, rows: int, length: int, run: Callable[[], _Outcome]) -> _Outcome | None:
        """What `run` gives for a batch of that shape; `None` where memory runs out, or did for fewer rows.

        Raises:
            Exception: whatever `run` raises; of a lack of memory only that for a single row.
        """
        if rows >= self._lacking.get(length, rows + 1):
            return None
        try:
            return run()
        except Exception as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
            forget(error)
            self._lacking[length] = rows
            return None

    def largest(self, grid: Sequence[Mapping[int, float]], lengths: Sequence[int]) -> int | None:
        """The rows for which there is memory at any of the lengths; `None` if there was for all that were tried."""
        known = dict(zip(lengths, grid, strict=True))
        return min((max(known[length]) for length in self._lacking), default=None)


def _wide(
    device: Device, open_with: Callable[[int], Backend], spec: ModelSpec, narrow: Costs, *, seated: bool
) -> LanePlacement | None:
    """A backend with all threads, measured alone at one row and at the most of a batch, if it is quicker.

    One for which there is no memory is done without.
    """
    if len(device.lanes) == 1:
        return None
    try:
        return _if_quicker(device, open_with, spec, narrow, seated=seated)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        forget(error)
        return None


def _if_quicker(
    device: Device, open_with: Callable[[int], Backend], spec: ModelSpec, narrow: Costs, *, seated: bool
) -> LanePlacement | None:
    backend = device.call(lambda _: open_with(device.threads))

    def seconds(rows: int, length: int) -> float:
        def on_lane(lane: Lane) -> float:
            device.seat(lane, seated=seated)
            return _seconds(backend, spec.example(rows, length))

        return device.call(on_lane)

    alone = [
        {rows: seconds(rows, length) for rows in sorted({1, table.knee})}
        for table, length in zip(narrow.tables, narrow.lengths or (0,), strict=True)
    ]
    # The last length is the one for which threads are worth most.
    if alone[-1][1] * WIDE_GAIN > narrow.tables[-1].seconds(1):
        backend.close()
        return None
    return LanePlacement(backend, Costs([CostTable(known) for known in alone], narrow.lengths))


def measure_grid(
    seconds: Callable[[int, int], float | None], rows: Sequence[int], lengths: Sequence[int]
) -> list[dict[int, float]]:
    """For every length, what batches of these rows cost; `seconds(rows, length)` measures one, and is `None` where
    there is no memory for it.

    Small batches come first, and none that does not fit into the time, going by the smaller one. A size that seems to
    bring nothing rules out no larger one: a disturbance of a tenth of a second would make it seem so.
    """
    grid: list[dict[int, float]] = [{} for _ in lengths]
    end = time.perf_counter() + max(GRID_SECONDS, GRID_SECONDS_PER_LENGTH * len(lengths))
    for smaller, count in zip((0, *rows), rows, strict=False):
        for known, length in zip(grid, lengths, strict=True):
            left = end - time.perf_counter()
            if smaller and (smaller not in known or known[smaller] * count / smaller > left):
                continue
            taken = seconds(count, length)
            if taken is not None:
                known[count] = taken
    return grid


def compare_again(once: Callable[[int], float | None], known: dict[int, float], seconds: float) -> None:
    """Correct for some seconds what is `known` of the batches that may be the knee; `once(rows)` is one run, and `None`
    where there is no memory for it any more.

    Who they are is asked anew in every round: what was disturbed at first is not out of it for good.
    """
    taken: dict[int, list[float]] = {rows: [] for rows in known}  # without the first: it allocated memory
    end = time.perf_counter() + seconds
    for count in range(ROUNDS):
        near = _near_the_knee(known)
        if len(near) == 1 or (count >= LEAST_ROUNDS and time.perf_counter() > end):
            return
        again = next(take_turns({rows: partial(once, rows) for rows in near}))
        for rows in near:
            if rows not in again:
                del known[rows]
                continue
            taken[rows].append(again[rows])
            known[rows] = _typical(taken[rows])


def _near_the_knee(known: Mapping[int, float]) -> list[int]:
    """The knee as it seems to be, the next larger batch, and the smaller ones that are not clearly worse."""
    rates = {rows: rate(rows, seconds) for rows, seconds in known.items()}
    knee, best = CostTable(known).knee, max(rates.values())
    return [rows for rows in rates if rows <= 2 * knee and (rows > knee or rates[rows] >= NEAR * best)]


def _row_buckets(backend: Backend, max_rows: int, lengths: Sequence[int]) -> tuple[int, ...]:
    if lengths and not backend.row_buckets:
        return tuple(sorted({min(rows, max_rows) for rows in (*SPARSE_ROWS, max_rows)}))
    return buckets_up_to(max_rows, backend.row_buckets)


def _seconds(backend: Backend, batch: Arrays) -> float:
    """Seconds of a typical run."""
    taken: list[float] = []
    first = _timed(backend, batch)
    if first > WARM_SECONDS:
        return first
    while len(taken) < WARM_RUNS and sum(taken) < WARM_SECONDS:
        taken.append(_timed(backend, batch))
    return _typical(taken)


def _timed(backend: Backend, batch: Arrays) -> float:
    return timed(partial(backend.run, batch))


def _typical(times: Sequence[float]) -> float:
    """The median; the best would favour small batches, which are lucky more often, but for tiny ones."""
    return min(times) if min(times) < TINY_S else statistics.median_low(times)
