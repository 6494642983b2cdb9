"""How many rows per second artifacts answer with one lane of all threads, and with a lane per thread.

`lanes: auto` decides by these numbers, so they are taken as the lanes would work: in one fresh process, every lane with
its own instance of the model, all lanes at once, and the two ways in turns, so that a slow minute hits both alike. One
artifact at a time, so that memory holds no more than one model for every lane and one. Started by `speed.py` as
a child; prints one JSON line.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice, product
from pathlib import Path

from leanserve.artifacts.load import load_model
from leanserve.artifacts.store import ArtifactStore
from leanserve.bases.opening import reopen_base
from leanserve.contracts import Arrays, Backend
from leanserve.evaluation.interleaved_benchmark import examples, limits_in, sizes_up_to, tell_parent
from leanserve.evaluation.measure import read_share
from leanserve.memory import exit_when_out, forget, is_out_of_memory
from leanserve.runtime.device import Device, Lane
from leanserve.runtime.formats import open_backend
from leanserve.runtime.formats.torch import use_threads
from leanserve.timing import runs_per_second, take_turns

ROUNDS = 5
TURN_S = 0.05
STREAMS = (1, 2, 4)
"""Lanes that are compared on a GPU, where each is a stream: beyond four, kernels wait for each other anyway."""


def main(cache: str, origin: str, share: str, seconds: str, *artifacts: str) -> None:
    """Measure the artifacts, each given as `KEY:ROWS` with the largest batch that fits into memory, in about so many
    seconds, a round of each at least; print rows per second by key and number of lanes as JSON.
    """
    base = reopen_base(origin)
    store = ArtifactStore(Path(cache))
    whole = read_share(share)
    numbers = (1, whole.threads) if whole.device == "cpu" else STREAMS
    rates = {}
    for number, (key, rows) in enumerate(limits_in(artifacts).items()):
        tell_parent(number, len(artifacts), "several lanes beside one")

        def load(threads: int, key: str = key) -> Backend:
            processors = whole.processors if threads == whole.threads else ()
            return open_backend(load_model(store, base, key), whole._replace(threads=threads, processors=processors))

        batches = examples(store.ancestry(key)[-1].spec, sizes_up_to([rows], float(seconds)))
        own = whole.processors if store.format_of(key).places_threads else ()
        rates[key] = lane_rates(load, batches, whole.threads, float(seconds) / len(artifacts), numbers, own)
    sys.stdout.write(json.dumps(rates) + "\n")


def lane_rates(
    load: Callable[[int], Backend],
    batches: Sequence[Arrays],
    threads: int,
    seconds: float,
    numbers: Sequence[int] = (),
    processors: Sequence[int] = (),
) -> dict[int, float]:
    """Number of lanes (1 and `threads`, unless `numbers` says which) -> rows per second at the best of the batch
    sizes, in the best round.

    No round is begun after so many `seconds`, but the first. Lanes stay on `processors`, where it says some.

    The best and not the median: what else the machine does can only slow a round down, and a wide lane, whose threads
    wait for each other, far more than narrow ones. `load` opens the model for a lane of so many threads, on that lane.
    Every lane takes memory: what there is none for is left out, and 0 where that is everything.
    """
    numbers = tuple(dict.fromkeys(numbers or (1, threads)))
    best = dict.fromkeys(numbers, 0.0)
    ways = [way for lanes in numbers if (way := _open(load, threads, lanes, processors)) is not None]
    try:
        turns = {
            (place, len(way.device.lanes)): partial(way.turn, batch)
            for (place, batch), way in product(enumerate(batches), ways)
        }
        end = time.perf_counter() + seconds
        for measured in islice(take_turns(turns), ROUNDS):
            for (_, lanes), rate in measured.items():
                best[lanes] = max(best[lanes], rate)
            if time.perf_counter() >= end:
                break
    finally:
        for way in ways:
            way.close()
    return best


def _open(load: Callable[[int], Backend], threads: int, lanes: int, processors: Sequence[int]) -> _Way | None:
    """`None` if there is no memory for so many lanes; one lane ran when its artifact was measured."""
    try:
        return _Way(load, threads, lanes, processors)
    except Exception as error:
        if lanes == 1 or not is_out_of_memory(error):
            raise
        forget(error)
        return None


class _Way:
    """A device with that many lanes, and the model on each of them."""

    def __init__(self, load: Callable[[int], Backend], threads: int, lanes: int, processors: Sequence[int]) -> None:
        self.device = Device(f"{lanes}-lanes", threads, lanes, processors)
        loading = threading.Lock()

        def open_on(lane: Lane) -> Backend:
            with loading:
                use_threads(lane.threads)
                return load(lane.threads)

        try:
            self.backends = self.device.call_on_each(open_on)
        except BaseException:
            self.device.close()
            raise
        self._most: int | None = None

    def turn(self, batch: Arrays) -> float | None:
        """Rows per second of all lanes together, over `TURN_S` seconds or at least one batch each.

        `None` for a batch for which memory runs out, and from then on for all that are as large.
        """
        rows = len(batch[0])
        if self._most is not None and rows > self._most:
            return None
        try:
            return sum(self.device.call_on_each(lambda lane: self._rate(lane, batch)))
        except Exception as error:
            if (rows, len(self.device.lanes)) == (1, 1) or not is_out_of_memory(error):
                raise
            forget(error)
            self._most = rows - 1
            return None

    def close(self) -> None:
        self.device.call_on_each(lambda lane: self.backends[lane.index].close())
        self.device.close()

    def _rate(self, lane: Lane, batch: Arrays) -> float:
        self.device.seat(lane, seated=True)
        use_threads(lane.threads)
        return runs_per_second(partial(self.backends[lane.index].run, batch), TURN_S) * len(batch[0])


if __name__ == "__main__":
    with exit_when_out():
        main(*sys.argv[1:])
    os._exit(0)  # skip the teardown of thread pools: nothing is left to lose
