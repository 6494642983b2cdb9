"""A service whose variants all run in onnxruntime, as a real process: what it loads, and what memory it takes.

The model is a small encoder whose batches at warm-up take far more than its weights.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from test_end_to_end import start, stop

from leanserve.runtime.linux.processors import own_processors
from tiny_graphs import graph, random, write

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells what a process holds"
)

VOCABULARY, WIDTH, INNER = 60_000, 256, 2048
ENCODER = """
agraph (int64[rows, length] input_ids) => (float[rows, 256] embedding) {
    vectors = Gather (table, input_ids)
    wide = MatMul (vectors, widen)
    positive = Relu (wide)
    narrow = MatMul (positive, narrow_down)
    embedding = ReduceMax <axes = [1], keepdims = 0> (narrow)
}
"""
CONFIG = """\
base: {onnx: encoder.onnx, outputs: {embedding: embedding}, rows: one_length}
data: {synthetic: 16}
threads: 2
lanes: 1 # with two, a wide session is kept where it was quicker at that start
variants:
  - name: float
  - name: int8
    passes: [{kind: quantize_dynamic}, {kind: onnxruntime}]
drain: {delay_s: 0}
"""
BARE = """
import re, sys
import onnxruntime
sessions = []
for path in sys.argv[1:]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = 2, 1
    sessions.append(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
print(re.search(r"^Rss: +([0-9]+)", open("/proc/self/smaps_rollup").read(), re.MULTILINE)[1])
"""


def resident_kib(pid: int) -> int:
    """Memory of a process, with all of what it shares: who else has the same libraries open is of no account."""
    found = re.search(r"^Rss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def has_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    weights = {
        "table": random(VOCABULARY, WIDTH),
        "widen": random(WIDTH, INNER, seed=1),
        "narrow_down": random(INNER, WIDTH, seed=2),
    }
    write(folder / "encoder.onnx", graph(ENCODER, weights))
    (folder / "config.yaml").write_text(CONFIG)
    return folder


class Seen(NamedTuple):
    """Of a service that is ready."""

    memory_kib: int
    torch: bool
    processors: list[int]
    """How many each of its threads may use."""


def ready(folder: Path) -> Seen:
    service = start(folder / "config.yaml", folder / "cache", folder / "log", within=120)
    try:
        tasks = [int(task.name) for task in Path(f"/proc/{service.process.pid}/task").iterdir()]
        processors = [len(os.sched_getaffinity(task)) for task in tasks]
        return Seen(resident_kib(service.process.pid), has_torch(service.process.pid), processors)
    finally:
        assert stop(service) == 0


@pytest.fixture(scope="module")
def built(folder: Path) -> Seen:
    """A service that built its variants when it started."""
    return ready(folder)


@pytest.fixture(scope="module")
def cached(folder: Path, built: Seen) -> Seen:
    """One that found them in the cache afterwards."""
    assert built
    return ready(folder)


def test_no_torch_is_loaded(built: Seen, cached: Seen) -> None:
    assert not built.torch, "the build has a process of its own"
    assert not cached.torch


@pytest.mark.skipif(own_processors(2) == (), reason="two threads have places where there are two processors, no more")
def test_its_lane_and_the_other_threads_of_its_sessions_stay_where_they_are(cached: Seen) -> None:
    assert cached.processors.count(1) == 3, "the lane, and the second thread of each session"


def test_a_service_that_built_its_variants_takes_no_more_than_one_that_found_them(built: Seen, cached: Seen) -> None:
    """The model is looked at in one process, its variants are built in another, and both are gone."""
    assert built.memory_kib <= 1.1 * cached.memory_kib


def test_a_service_takes_little_more_than_its_sessions(folder: Path, cached: Seen) -> None:
    paths = [str(path) for path in (folder / "cache").rglob("model.onnx")]
    assert len(paths) == 3, "the base, and int8 before and after it got its options"
    served = sorted(paths, key=lambda path: Path(path).stat().st_size)[1:]
    bare = subprocess.run([sys.executable, "-c", BARE, *served], check=True, capture_output=True, text=True)
    assert cached.memory_kib <= 1.6 * int(bare.stdout)
