"""Time artifacts beside an anchor: machines drift, and only ratios taken in one interleaved run can be trusted.

The anchor, which is the base, stays loaded; the others join it a few at a time and take turns with it on one device
thread, a little in each round. So a slow minute hits both sides of every ratio, memory holds a few models and never
all, and a variant that is added later is timed with the anchor alone. Started by `quality.py` as a child; prints one
JSON line.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path

from leanserve.artifacts.load import load_model
from leanserve.artifacts.store import ArtifactStore
from leanserve.bases.opening import reopen_base
from leanserve.contracts import Arrays, Backend, Json, ModelSpec, Share
from leanserve.memory import exit_when_out, forget, is_out_of_memory
from leanserve.runtime.costs import TYPICAL
from leanserve.runtime.device import Device
from leanserve.runtime.formats import open_backend
from leanserve.timing import median_seconds, take_turns

BATCHES = (1, 8, 32)
ROUNDS = 7
ROUND_S = 0.03
GROUP = 3
"""Artifacts that are loaded at a time, besides the anchor."""

Latencies = dict[str, dict[int, list[float]]]
"""Name -> rows in the batch -> seconds per batch, one median per round."""
Medians = dict[int, dict[str, Json]]
"""Rows in the batch -> `ms` and `anchor_ms`, medians, and `ratio`: median, least and largest of the rounds."""


def sizes_up_to(limits: Iterable[int]) -> list[int]:
    """Rows of the batches that are timed where these are the largest that fit into memory."""
    return sorted({min(rows, limit) for limit in limits for rows in BATCHES})


def examples(spec: ModelSpec, sizes: Iterable[int]) -> list[Arrays]:
    """The batches that are timed, one of each number of rows that one may have; dynamic axes have a typical length."""
    allowed = dict.fromkeys(map(spec.most_rows, sizes))
    return [spec.example(rows, min(TYPICAL, spec.max_length)) for rows in allowed]


def interleaved(
    backends: Mapping[str, Backend],
    batches: Mapping[str, Sequence[Arrays]],
    round_s: float,
    limits: Mapping[str, int],
) -> Iterator[Latencies]:
    """Time every backend on its batches, round by round; yields the latencies so far. Call it on the device thread.

    A batch with more rows than the `limits` of a backend is left out there, and one for which memory runs out: what
    else is loaded takes some, too.
    """
    most = dict(limits)
    by_size = sorted(((len(batch[0]), name, batch) for name in backends for batch in batches[name]), key=itemgetter(0))
    turns = {(name, rows): partial(_turn, backends[name], batch, round_s, name, most) for rows, name, batch in by_size}
    latencies: Latencies = {name: {} for name in backends}
    for measured in take_turns(turns):
        for (name, rows), seconds in measured.items():
            latencies[name].setdefault(rows, []).append(seconds)
        for name, by_rows in latencies.items():
            latencies[name] = {rows: seconds for rows, seconds in by_rows.items() if (name, rows) in measured}
        yield latencies


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


def main(cache: str, origin: str, threads: str, group: str, *artifacts: str) -> None:
    """Time the artifacts, each given as `KEY:ROWS` with the largest batch that fits into memory, the first of them as
    the anchor of `group` others at a time; print `Medians` by key as JSON.
    """
    base = reopen_base(origin)
    store = ArtifactStore(Path(cache))
    device = Device("benchmark", int(threads))

    def load(key: str) -> Backend:
        return open_backend(load_model(store, base, key), Share(int(threads)))

    def spec_of(key: str) -> ModelSpec:
        return store.ancestry(key)[-1].spec

    try:
        [timed] = device.call_on_each(lambda _: beside_anchor(load, spec_of, limits_in(artifacts), int(group)))
    finally:
        device.close()
    sys.stdout.write(json.dumps(timed) + "\n")


def beside_anchor(
    load: Callable[[str], Backend], spec_of: Callable[[str], ModelSpec], limits: Mapping[str, int], group: int
) -> dict[str, Medians]:
    """Time artifacts by name, the first as the anchor of the others; `limits`: the most rows that each has memory for.

    `load` opens one; no more than `group` are open at a time besides the anchor. `spec_of` tells what one takes.
    """
    anchor, *others = limits
    backends = {anchor: load(anchor)}
    found: dict[str, Medians] = {}
    for start in range(0, max(1, len(others)), group):
        members = others[start : start + group]
        backends |= {key: load(key) for key in members}
        sizes = sizes_up_to(limits[key] for key in backends)
        batches = {key: examples(spec_of(key), sizes) for key in backends}
        *_, timed = islice(interleaved(backends, batches, ROUND_S, limits), ROUNDS)
        found |= {key: _medians(timed[key], timed[anchor]) for key in timed if key not in found}
        for key in members:
            backends.pop(key).close()
    backends[anchor].close()
    return found


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
