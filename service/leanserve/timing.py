"""The one way in which times are compared: what is compared takes turns, round by round.

Machines drift, by a tenth within a minute and more beside other work. Measured one after the other, whatever came
later looks faster or slower for that; in turns, a slow moment hits all alike, and ratios within a round can be trusted.
Passes that choose, the warm-up, the build's benchmark and `leanserve bench` all time by this.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

_Key = TypeVar("_Key")
MEASURE_S = 120.0
"""In which a build times all its artifacts, if nobody says otherwise; and again, with several lanes."""


def timed(run: Callable[[], object]) -> float:
    """Seconds of one run."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def median_seconds(run: Callable[[], object], seconds: float) -> float:
    """Median seconds of a run: of as many as fit into so many seconds, at least one, after one that does not count.

    That one brings caches and threads back after the turns of others.
    """
    run()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while not samples or time.perf_counter() < end:
        samples.append(timed(run))
    return statistics.median(samples)


def runs_per_second(run: Callable[[], object], seconds: float) -> float:
    """How often something runs in a second, over at least so many seconds, after a run that does not count."""
    run()
    started, runs, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < seconds:
        run()
        runs, elapsed = runs + 1, time.perf_counter() - started
    return runs / elapsed


def take_turns(turns: Mapping[_Key, Callable[[], float | None]]) -> Iterator[dict[_Key, float]]:
    """Round after round, without end: what every turn measured in it, by key.

    A turn that gives `None`, as where memory ran out, is left out from then on.
    """
    waiting = dict(turns)
    while True:
        measured: dict[_Key, float] = {}
        for key, turn in list(waiting.items()):
            value = turn()
            if value is None:
                del waiting[key]
            else:
                measured[key] = value
        yield measured
