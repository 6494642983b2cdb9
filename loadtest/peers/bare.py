"""An engine alone: what the same threads do with a network when nobody serves it.

    python -m loadtest.peers.bare FILE NETWORK ENGINE LOOPS THREADS BATCH SECONDS

`LOOPS` runs of `THREADS` threads each go on at once over batches of `BATCH` rows, back to back, each in a thread of
this process: onnxruntime has a session for each, OpenVINO a stream of one compiled model, as its `benchmark_app` has.
Printed is one line of JSON: rows per second of all loops together, and the median milliseconds of a run.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from leanserve.contracts import Array
from loadtest.peers.network import example


class Subject(NamedTuple):
    """What is run: a file that was made of a network, and by which engine."""

    path: Path
    network: str
    """A key of `network.SPECS`: what it takes."""
    engine: str = "onnxruntime"
    """Or `openvino-` and the precision of float layers, `f32` or `bf16`."""


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


def measure(subject: Subject, way: Way, seconds: float) -> Bare:
    """Run the loops in a process of their own, as a server would be."""
    command = [sys.executable, "-m", "loadtest.peers.bare", *map(str, subject), *map(str, way), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Bare(**json.loads(done.stdout))


def main(arguments: Sequence[str]) -> None:
    subject = Subject(Path(arguments[0]), *arguments[1:3])
    loops, threads, batch = map(int, arguments[3:6])
    way, seconds = Way(loops, threads, batch), float(arguments[6])
    opened = _onnxruntime if subject.engine == "onnxruntime" else _openvino
    with ThreadPoolExecutor(loops) as pool:
        runs = list(pool.map(lambda run: _loop(run, subject, batch, seconds), opened(subject, way)))
    rate = sum(len(times) * batch / sum(times) for times in runs)
    print(json.dumps({"rate": rate, "p50_ms": statistics.median(t for times in runs for t in times) * 1000}))


def _loop(run: Callable[[Array], object], subject: Subject, batch: int, seconds: float) -> list[float]:
    """Seconds of each run, the first two (which allocate) left out."""
    rows = example(subject.network, batch)
    for _ in range(2):
        run(rows)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end or not times:
        run(rows)
        times.append(time.perf_counter() - began)
    return times


def _onnxruntime(subject: Subject, way: Way) -> list[Callable[[Array], object]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = way.threads, 1
    options.add_session_config_entry("session.set_denormal_as_zero", "1")

    def opened() -> Callable[[Array], object]:
        session = onnxruntime.InferenceSession(subject.path, options, providers=["CPUExecutionProvider"])
        return lambda rows: session.run(None, {"x": rows})

    return [opened() for _ in range(way.loops)]


def _openvino(subject: Subject, way: Way) -> list[Callable[[Array], object]]:
    """With its own defaults but for precision, streams and threads; as they are here: threads pinned to cores."""
    import openvino

    settings: dict[str, Any] = {
        "NUM_STREAMS": way.loops,
        "INFERENCE_NUM_THREADS": way.loops * way.threads,
        "INFERENCE_PRECISION_HINT": subject.engine.removeprefix("openvino-"),
    }
    compiled = openvino.Core().compile_model(str(subject.path), "CPU", settings)

    def opened() -> Callable[[Array], object]:
        request = compiled.create_infer_request()
        return lambda rows: request.infer([rows], share_inputs=True, share_outputs=True)

    return [opened() for _ in range(way.loops)]


if __name__ == "__main__":
    main(sys.argv[1:])
