"""Time artifacts side by side: machines drift, and only ratios taken in one interleaved run can be trusted.

All artifacts are loaded into one fresh process and take turns on one device thread, a little in each round, so that a
slow minute hits all of them alike. Started by `quality.py` as a child; prints one JSON line.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

from leanserve.artifacts.load import load_model
from leanserve.artifacts.store import ArtifactStore
from leanserve.bases.opening import reopen_base
from leanserve.contracts import Arrays, Backend, ModelSpec
from leanserve.memory import exit_when_out, forget, is_out_of_memory
from leanserve.runtime.costs import TYPICAL
from leanserve.runtime.device import Device
from leanserve.runtime.formats import open_backend

BATCHES = (1, 8, 32)
ROUNDS = 7
ROUND_S = 0.03

Latencies = dict[str, dict[int, list[float]]]
"""Name -> rows in the batch -> seconds per batch, one median per round."""


def sizes_up_to(limits: Iterable[int]) -> list[int]:
    """Rows of the batches that are timed where these are the largest that fit into memory."""
    return sorted({min(rows, limit) for limit in limits for rows in BATCHES})


def examples(spec: ModelSpec, sizes: Iterable[int]) -> list[Arrays]:
    """The batches that are timed, one of each number of rows that one may have; dynamic axes have a typical length."""
    allowed = dict.fromkeys(map(spec.most_rows, sizes))
    return [spec.example(rows, min(TYPICAL, spec.max_length)) for rows in allowed]


def interleaved(
    backends: Mapping[str, Backend],
    batches: Sequence[Arrays],
    rounds: int,
    round_s: float,
    limits: Mapping[str, int],
) -> Iterator[Latencies]:
    """Time every backend on every batch, round by round; yields the latencies so far. Call it on the device thread.

    A batch with more rows than the `limits` of a backend is left out there, and one for which memory runs out: what
    else is loaded takes some, too.
    """
    latencies: Latencies = {name: {} for name in backends}
    most = dict(limits)
    for _ in range(rounds):
        for batch, name in product(batches, backends):
            rows = len(batch[0])
            if rows > most[name]:
                continue
            try:
                latencies[name].setdefault(rows, []).append(_median_s(backends[name], batch, round_s))
            except Exception as error:
                if rows == 1 or not is_out_of_memory(error):
                    raise
                forget(error)
                most[name] = rows - 1
                del latencies[name][rows]
        yield latencies


def main(cache: str, origin: str, threads: str, *artifacts: str) -> None:
    """Time the artifacts, each given as `KEY:ROWS` with the largest batch that fits into memory; print the median
    milliseconds by key and rows as JSON.
    """
    base = reopen_base(origin)
    store = ArtifactStore(Path(cache))
    limits = limits_in(artifacts)
    device = Device("race", int(threads))

    def run() -> Latencies:
        backends = {key: open_backend(load_model(store, base, key), int(threads)) for key in limits}
        batches = examples(base.spec, sizes_up_to(limits.values()))
        *_, last = interleaved(backends, batches, ROUNDS, ROUND_S, limits)
        return last

    try:
        [timed] = device.call_on_each(lambda _: run())
    finally:
        device.close()
    medians = {key: {rows: statistics.median(s) * 1000 for rows, s in by.items()} for key, by in timed.items()}
    sys.stdout.write(json.dumps(medians) + "\n")


def limits_in(artifacts: Iterable[str]) -> dict[str, int]:
    """Key -> rows, of what is written `KEY:ROWS`."""
    return {key: int(rows) for key, rows in (artifact.split(":") for artifact in artifacts)}


def _median_s(backend: Backend, batch: Arrays, seconds: float) -> float:
    backend.run(batch)  # brings caches and threads back after the others' turns
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while not samples or time.perf_counter() < end:
        started = time.perf_counter()
        backend.run(batch)
        samples.append(time.perf_counter() - started)
    return statistics.median(samples)


if __name__ == "__main__":
    with exit_when_out():
        main(*sys.argv[1:])
    os._exit(0)  # skip the teardown of thread pools: nothing is left to lose
