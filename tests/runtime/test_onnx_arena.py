"""Memory of several onnxruntime sessions, in processes of their own: what one computes with is used by the others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_graphs import graph, random, write

WIDTH, INNER = 256, 8192
WEIGHTS = 2 * 4 * WIDTH * INNER
ROWS = 2048
COMPUTED = 4 * INNER * ROWS
"""Bytes between the two layers for a batch of so many rows."""
LAYERS = """
agraph (float[rows, 256] x) => (float[rows, 256] y) {
    h = MatMul (x, first)
    r = Relu (h)
    y = MatMul (r, second)
}
"""
PROGRAM = """
import json, sys
from pathlib import Path
from leanserve.contracts import ModelSpec, OnnxModel, TensorSpec
from leanserve.runtime.backends.onnx_runtime import OnnxRuntimeBackend
from leanserve.runtime.unused_memory import give_back

def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

path, rows = Path(sys.argv[1]), int(sys.argv[2])
spec = ModelSpec((TensorSpec("x", "float32", (256,)),), (TensorSpec("y", "float32", (256,)),))
give_back()
before, seen = anonymous_bytes(), []
backends = [OnnxRuntimeBackend(OnnxModel(path, spec), threads) for threads in (1, 2, 1)]
batch = spec.example(rows)
for step in ("opened", "ran", "given back", "closed"):
    for backend in backends:
        if step == "ran":
            backend.run(batch)
        if step == "closed":
            backend.close()
    if step != "ran":
        give_back()
    seen.append(anonymous_bytes() - before)
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, of which the inner one is wide."""
    weights = {"first": random(WIDTH, INNER), "second": random(INNER, WIDTH)}
    return write(tmp_path_factory.mktemp("graph") / "model.onnx", graph(LAYERS, weights))


def test_sessions_compute_in_the_same_memory_and_give_it_back(path: Path) -> None:
    run = [sys.executable, "-c", PROGRAM, str(path), str(ROWS)]
    told = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    opened, ran, given_back, closed = json.loads(told)
    if not opened:
        pytest.skip("this system does not tell what memory is in use")
    assert opened > 2.5 * WEIGHTS, "each session has its weights"
    assert COMPUTED < ran - opened < 2.5 * COMPUTED, "one computes where the other did, in h and r at most"
    assert given_back < opened + 0.1 * COMPUTED
    assert closed < 0.1 * opened, "weights go with their session"
