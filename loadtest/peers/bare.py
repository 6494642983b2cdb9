"""onnxruntime alone: what the same threads do with a network when nobody serves it.

    python -m loadtest.peers.bare NETWORK.onnx LOOPS THREADS BATCH SECONDS

`LOOPS` sessions of `THREADS` threads each run batches of `BATCH` rows back to back, each in a thread of this process.
Printed is one line of JSON: rows per second of all loops together, and the median milliseconds of a run.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from loadtest.peers.network import example


class Way(NamedTuple):
    """How a bare loop uses the cores."""

    loops: int
    threads: int
    batch: int

    def __str__(self) -> str:
        return f"{self.loops} x {self.threads} threads, batch {self.batch}"


class Bare(NamedTuple):
    """Rows per second, and the median milliseconds of a run."""

    rate: float
    p50_ms: float


def measure(network: Path, way: Way, seconds: float) -> Bare:
    """Run the loops in a process of their own, as a server would be."""
    command = [sys.executable, "-m", "loadtest.peers.bare", str(network), *map(str, way), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Bare(**json.loads(done.stdout))


def main(arguments: Sequence[str]) -> None:
    network, (loops, threads, batch), seconds = Path(arguments[0]), map(int, arguments[1:4]), float(arguments[4])
    with ThreadPoolExecutor(loops) as pool:
        runs = list(pool.map(lambda _: _loop(network, threads, batch, seconds), range(loops)))
    rate = sum(len(times) * batch / sum(times) for times in runs)
    print(json.dumps({"rate": rate, "p50_ms": statistics.median(t for times in runs for t in times) * 1000}))


def _loop(network: Path, threads: int, batch: int, seconds: float) -> list[float]:
    """Seconds of each run, the first two (which allocate) left out."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
    rows = example(network.stem, batch)
    for _ in range(2):
        session.run(None, {"x": rows})
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end or not times:
        session.run(None, {"x": rows})
        times.append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    main(sys.argv[1:])
