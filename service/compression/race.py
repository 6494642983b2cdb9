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
from pathlib import Path

from service.backends.choose import open_backend
from service.bases.opening import reopen_base
from service.compression.artifacts import ArtifactStore
from service.compression.load import load_model
from service.contracts import Arrays, Backend, InputSpec
from service.serving.costs import TYPICAL
from service.serving.device import Device

BATCHES = (1, 8, 32)
ROUNDS = 7
ROUND_S = 0.03

Latencies = dict[str, dict[int, list[float]]]
"""Name -> rows in the batch -> seconds per batch, one median per round."""


def examples(spec: InputSpec, sizes: Iterable[int]) -> list[Arrays]:
    """The batches that are timed, one of each number of rows that one may have; dynamic axes have a typical length."""
    allowed = dict.fromkeys(map(spec.most_rows, sizes))
    return [spec.example(rows, min(TYPICAL, spec.max_length)) for rows in allowed]


def interleaved(
    backends: Mapping[str, Backend], batches: Sequence[Arrays], rounds: int, round_s: float
) -> Iterator[Latencies]:
    """Time every backend on every batch, round by round; yields the latencies so far. Call it on the device thread."""
    latencies: Latencies = {name: {} for name in backends}
    for _ in range(rounds):
        for batch in batches:
            for name, backend in backends.items():
                latencies[name].setdefault(len(batch[0]), []).append(_median_s(backend, batch, round_s))
        yield latencies


def main(cache: str, origin: str, threads: str, *keys: str) -> None:
    """Time the artifacts `keys` and print the median milliseconds by key and rows as JSON."""
    base = reopen_base(origin)
    store = ArtifactStore(Path(cache))
    device = Device("race", int(threads))

    def run() -> Latencies:
        backends = {key: open_backend(load_model(store, base, key), int(threads)) for key in keys}
        *_, last = interleaved(backends, examples(base.spec, BATCHES), ROUNDS, ROUND_S)
        return last

    try:
        [timed] = device.call_on_each(lambda _: run())
    finally:
        device.close()
    medians = {key: {rows: statistics.median(s) * 1000 for rows, s in by.items()} for key, by in timed.items()}
    sys.stdout.write(json.dumps(medians) + "\n")


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
    main(*sys.argv[1:])
    os._exit(0)  # skip the teardown of thread pools: nothing is left to lose
