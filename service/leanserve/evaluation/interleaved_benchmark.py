"""Time artifacts beside an anchor: machines drift, and only ratios taken in one interleaved run can be trusted.

The anchor, which is the base, stays loaded; the others join it a few at a time and take turns with it on one device
thread, a little in each round. So a slow minute hits both sides of every ratio, memory holds a few models and never
all, and a variant that is added later is timed with the anchor alone.

Rounds in which our threads waited for a processor are repeated while there is time; where too few stay undisturbed, the
least disturbed count, and what they waited is told. Started by `speed.py` as a child; prints lines of JSON, how far it
is and at last the result.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from leanserve.artifacts.benchmarks import QUIET
from leanserve.artifacts.load import load_model
from leanserve.artifacts.store import ArtifactStore
from leanserve.bases.opening import reopen_base
from leanserve.contracts import Arrays, Backend, Json, ModelSpec, Progress
from leanserve.evaluation.fresh_process import nobody_told
from leanserve.evaluation.measure import read_share
from leanserve.memory import exit_when_out, forget, is_out_of_memory
from leanserve.runtime.costs import TYPICAL
from leanserve.runtime.device import Device
from leanserve.runtime.formats import open_backend
from leanserve.runtime.linux.contention import Contention
from leanserve.timing import median_seconds, take_turns, timed

BATCHES = (1, 8, 32)
ROUNDS = 7
FEWEST_ROUNDS = 3
"""However long they take."""
MOST_ROUNDS = 3 * ROUNDS
"""However many of them are disturbed: what has not passed by then stays for longer than anybody waits."""
ROUND_S = 0.03
LEAST_S = 20.0
"""For a group of artifacts, whatever the time for all: below that only single rows of many models would be timed."""
GROUP = 3
"""Artifacts that are loaded at a time, besides the anchor."""

Seat = Callable[[str], None]
"""Has the calling lane stay on its processor, or not, as the backend of this name is run when it serves."""
Latencies = dict[str, dict[int, list[float]]]
"""Name -> rows in the batch -> seconds per batch, one median per round."""
Medians = dict[int, dict[str, Json]]
"""Rows in the batch -> `ms` and `anchor_ms`, medians, and `ratio`: median, least and largest of the rounds."""


class Round(NamedTuple):
    """What was measured in a round."""

    seconds: Mapping[tuple[str, int], float]
    """Of a batch, by the name of the backend and the rows in the batch."""
    waited: float
    """Seconds that our threads waited for a processor, over those of the turn, in the worst turn."""


class TimedArtifact(NamedTuple):
    """What is known of an artifact after its rounds."""

    by_rows: Medians
    rounds: int
    waited: float
    """That of the worst of these rounds."""


def wherever(_: str) -> None:
    """A `Seat` that leaves the lane to the kernel."""


def sizes_up_to(limits: Iterable[int], seconds: float) -> list[int]:
    """Rows of the batches that are timed where these are the largest that fit into memory: single ones in no time."""
    return sorted({min(rows, limit) for limit in limits for rows in (BATCHES if seconds else BATCHES[:1])})


def examples(spec: ModelSpec, sizes: Iterable[int]) -> list[Arrays]:
    """The batches that are timed, one of each number of rows that one may have; dynamic axes have a typical length."""
    allowed = dict.fromkeys(map(spec.most_rows, sizes))
    return [spec.example(rows, min(TYPICAL, spec.max_length)) for rows in allowed]


def interleaved(
    backends: Mapping[str, Backend],
    batches: Mapping[str, Sequence[Arrays]],
    round_s: float,
    limits: Mapping[str, int],
    seat: Seat = wherever,
) -> Iterator[Latencies]:
    """Time every backend on its batches, round by round; yields the latencies so far. Call it on the device thread.

    Batches are left out as in `rounds_of`.
    """
    rounds: list[Round] = []
    for measured in rounds_of(backends, batches, round_s, limits, seat):
        rounds.append(measured)
        yield latencies_of(backends, rounds)


def rounds_of(
    backends: Mapping[str, Backend],
    batches: Mapping[str, Sequence[Arrays]],
    round_s: float,
    limits: Mapping[str, int],
    seat: Seat = wherever,
    progress: Progress = nobody_told,
) -> Iterator[Round]:
    """Rounds in which every backend runs every batch for `round_s` seconds, without end.

    A batch with more rows than the `limits` of a backend is left out there, and one for which memory runs out: what
    else is loaded takes some, too. `progress` is told of every turn of a round.
    """
    most = dict(limits)
    by_size = sorted(((len(batch[0]), name, batch) for name in backends for batch in batches[name]), key=itemgetter(0))
    contention, waited = Contention(), [0.0]

    def watched(number: int, turn: Callable[[], float | None]) -> float | None:
        seat(by_size[number][1])
        contention.waited_s()
        started = time.perf_counter()
        found = turn()
        waited.append(contention.waited_s() / max(time.perf_counter() - started, 1e-9))
        progress(number + 1, len(by_size), f"batches of {by_size[number][0]} rows")
        return found

    turns = {
        (name, rows): partial(watched, number, partial(_turn, backends[name], batch, round_s, name, most))
        for number, (rows, name, batch) in enumerate(by_size)
    }
    for measured in take_turns(turns):
        yield Round(measured, max(waited))
        waited[:] = [0.0]


def latencies_of(names: Iterable[str], rounds: Sequence[Round]) -> Latencies:
    """Of the batches that were run in all of some rounds, as far as memory went."""
    common = set.intersection(*(set(item.seconds) for item in rounds))
    return {
        name: {
            rows: [item.seconds[name, rows] for item in rounds]
            for other, rows in rounds[0].seconds
            if other == name and (name, rows) in common
        }
        for name in names
    }


def _turn(backend: Backend, batch: Arrays, seconds: float, name: str, most: dict[str, int]) -> float | None:
    """`None`, and fewer rows from then on, where there is no memory."""
    rows = len(batch[0])
    if rows > most[name]:
        return None
    try:
        return median_seconds(partial(backend.run, batch), seconds)
    except Exception as error:
        if rows == 1 or not is_out_of_memory(error):
            raise
        forget(error)
        most[name] = rows - 1
        return None


def main(cache: str, origin: str, share: str, seconds: str, group: str, *artifacts: str) -> None:
    """Time the artifacts, each given as `KEY:ROWS` with the largest batch that fits into memory, the first of them as
    the anchor of `group` others at a time, in about so many seconds; print `TimedArtifact` by key as JSON.
    """
    base = reopen_base(origin)
    store = ArtifactStore(Path(cache))
    whole = read_share(share)
    device = Device("benchmark", whole.threads, processors=whole.processors)

    def seat(key: str) -> None:
        device.seat(device.lanes[0], seated=store.format_of(key).places_threads)

    def load(key: str) -> Backend:
        device.seat(device.lanes[0], seated=False)
        return open_backend(load_model(store, base, key), whole)

    def spec_of(key: str) -> ModelSpec:
        return store.ancestry(key)[-1].spec

    bench = InterleavedBenchmark(load, spec_of, int(group), float(seconds), tell_parent, seat)
    try:
        [timed] = device.call_on_each(lambda _: bench.beside_anchor(limits_in(artifacts)))
    finally:
        device.close()
    sys.stdout.write(json.dumps({key: item._asdict() for key, item in timed.items()}) + "\n")


def tell_parent(done: float, total: float, note: str = "") -> None:
    """A line of JSON: how far this process is. A `contracts.Progress`."""
    sys.stdout.write(json.dumps({"share": done / total, "note": note}) + "\n")
    sys.stdout.flush()


class InterleavedBenchmark(NamedTuple):
    """How artifacts are timed."""

    load: Callable[[str], Backend]
    """Opens one by name."""
    spec_of: Callable[[str], ModelSpec]
    """Tells what one takes."""
    group: int
    """The most that are open at a time besides the anchor."""
    seconds: float
    """In which all should be done: no batch is timed whose `FEWEST_ROUNDS` would take longer, and no further round is
    begun later."""
    progress: Progress = nobody_told
    seat: Seat = wherever

    def beside_anchor(self, limits: Mapping[str, int]) -> dict[str, TimedArtifact]:
        """Time artifacts by name, the first as the anchor of the others; `limits`: the most rows that each has memory
        for.
        """
        anchor, *others = limits
        backends = {anchor: self.load(anchor)}
        found: dict[str, TimedArtifact] = {}
        starts = range(0, max(1, len(others)), self.group)
        for number, start in enumerate(starts):
            members = others[start : start + self.group]
            backends |= {key: self.load(key) for key in members}
            rounds = self._rounds(backends, limits, number, len(starts))
            timed, waited = latencies_of(backends, rounds), max(item.waited for item in rounds)
            new = [key for key in timed if key not in found]
            found |= {key: TimedArtifact(_medians(timed[key], timed[anchor]), len(rounds), waited) for key in new}
            for key in members:
                backends.pop(key).close()
        backends[anchor].close()
        return found

    def _rounds(
        self, backends: Mapping[str, Backend], limits: Mapping[str, int], number: int, groups: int
    ) -> list[Round]:
        """Those that count for one of the groups: `ROUNDS` undisturbed ones, if there is time for them."""
        rounds: list[Round] = []

        def tell(done: float, total: float, note: str = "") -> None:
            done = min(1.0, (len(rounds) + done / total) / ROUNDS)
            busy = sum(item.waited > QUIET for item in rounds)
            self.progress(number + done, groups, f"{note}, {busy} rounds disturbed by other work" if busy else note)

        end = time.perf_counter() + self.seconds / groups
        sizes = sizes_up_to((limits[key] for key in backends), self.seconds)
        sizes = self._affordable(backends, sizes, self.seconds / groups)
        batches = {key: examples(self.spec_of(key), sizes) for key in backends}
        for measured in rounds_of(backends, batches, ROUND_S, limits, self.seat, tell):
            rounds.append(measured)
            if _enough(rounds) or (len(rounds) >= FEWEST_ROUNDS and time.perf_counter() >= end):
                break
        return sorted(rounds, key=lambda item: item.waited)[:ROUNDS]

    def _affordable(self, backends: Mapping[str, Backend], sizes: Sequence[int], seconds: float) -> list[int]:
        """The sizes of which there is time for the fewest rounds; by the time of a single row, which always is."""
        of_a_row = sum(_second_run(backend, examples(self.spec_of(key), [1])[0]) for key, backend in backends.items())
        most = max(seconds, LEAST_S) / FEWEST_ROUNDS / max(of_a_row, 1e-9)
        return [rows for rows in sizes if rows <= max(most, min(sizes))]


def _second_run(backend: Backend, batch: Arrays) -> float:
    """Per row of the batch; the first run allocates memory."""
    backend.run(batch)
    return timed(partial(backend.run, batch)) / len(batch[0])


def _enough(rounds: Sequence[Round]) -> bool:
    return sum(item.waited <= QUIET for item in rounds) >= ROUNDS or len(rounds) >= MOST_ROUNDS


def _medians(ours: Mapping[int, Sequence[float]], anchor: Mapping[int, Sequence[float]]) -> Medians:
    found: Medians = {}
    for rows, seconds in ours.items():
        found[rows] = {"ms": statistics.median(seconds) * 1000}
        if rows in anchor:
            ratios = [one / other for one, other in zip(seconds, anchor[rows], strict=True)]
            found[rows] |= {
                "anchor_ms": statistics.median(anchor[rows]) * 1000,
                "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
            }
    return found


def limits_in(artifacts: Iterable[str]) -> dict[str, int]:
    """Key -> rows, of what is written `KEY:ROWS`."""
    return {key: int(rows) for key, rows in (artifact.split(":") for artifact in artifacts)}


if __name__ == "__main__":
    with exit_when_out():
        main(*sys.argv[1:])
    os._exit(0)  # skip the teardown of thread pools: nothing is left to lose
