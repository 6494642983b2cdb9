"""CONTRIBUTING's recipes followed literally: a format is a file and a row, a pass that lowers to it another two.

A copy of the source tree gets them and nothing else. Its own command line then builds a variant, serves it from the
cache, and notices damage to what the format and the pass have put into subfolders.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
TOYS = ROOT / "tests" / "support"
FORMAT_ROW = '    "npz": "leanserve.runtime.formats.npz",\n'
PASS_ROWS = ("from leanserve.passes.families.runtime.numpy_layers import NumpyLayers\n", "    | NumpyLayers\n")
NETWORK = """\
from torch import nn


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
"""
CONFIG = """\
base:
  python: own:network
  weights: own.safetensors
  inputs: {x: {shape: [6], dtype: float32}}
  outputs: {output: values}
data: {arrays: rows.npz, splits: {calibration: 8, gate: 32}}
gate: {min_agreement: 0.999}
threads: 1
variants:
  - name: float
  - name: numpy
    passes: [{kind: numpy_layers}]
"""


def insert(path: Path, before: str, row: str) -> None:
    """Put one row into a file, in front of the first place where `before` stands."""
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, row + before, 1))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with the two files and their rows, and a base with its config beside it."""
    root = tmp_path_factory.mktemp("tree")
    for name in ("service", "models"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    service = root / "service" / "leanserve"
    shutil.copy(TOYS / "toy_format.py", service / "runtime" / "formats" / "npz.py")
    insert(service / "runtime" / "formats" / "__init__.py", '    "onnx":', FORMAT_ROW)
    shutil.copy(TOYS / "toy_pass.py", service / "passes" / "families" / "runtime" / "numpy_layers.py")
    union = service / "passes" / "__init__.py"
    insert(union, "from leanserve.passes.families.runtime.onnxruntime", PASS_ROWS[0])
    insert(union, "    | OnnxRuntime\n", PASS_ROWS[1])
    (root / "own.py").write_text(NETWORK)
    (root / "config.yaml").write_text(CONFIG)
    np.savez(root / "rows.npz", x=np.random.default_rng(0).standard_normal((80, 6)).astype(np.float32))
    return root


@pytest.fixture(scope="module")
def module(tree: Path) -> nn.Module:
    """The base's own module, whose weights the copy is given."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    save_file(made.state_dict(), tree / "own.safetensors")
    return made.eval()


def command(tree: Path, *arguments: str) -> list[str]:
    """`leanserve` of the copied tree, as its own children are started."""
    child = tree / "service" / "leanserve" / "child.py"
    config = ("--config", str(tree / "config.yaml"), "--cache", str(tree / "cache"))
    return [sys.executable, "-P", str(child), str(os.getpid()), "leanserve", *arguments, *config]


@pytest.fixture(scope="module")
def built(tree: Path, module: nn.Module) -> Path:
    done = subprocess.run(command(tree, "build"), capture_output=True, text=True, check=False, cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    return tree


@contextmanager
def served(tree: Path) -> Iterator[tuple[str, str]]:
    """The URL of the service, and what it said until it was ready."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = tree / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command(tree, "serve", "--port", str(port)), stdout=stream, stderr=stream, cwd=tree)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            if _is_ready(url):
                break
            time.sleep(0.1)
        yield url, log.read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(url + "/readyz").status_code == 200
    except httpx.TransportError:
        return False


def answers(url: str, rows: np.ndarray[tuple[int, ...], np.dtype[np.float32]], variant: str) -> list[list[float]]:
    tensor = {"name": "x", "datatype": "FP32", "shape": list(rows.shape), "data": rows.ravel().tolist()}
    named = f"{url}/v2/models/own/versions/{variant}/infer"
    reply = httpx.post(named, json={"inputs": [tensor]}).raise_for_status().json()
    found: list[list[float]] = np.reshape(reply["outputs"][0]["data"], (len(rows), 3)).tolist()
    return found


def artifact_of(tree: Path) -> Path:
    """The folder of the artifact in the new format."""
    [found] = (path.parents[1] for path in (tree / "cache" / "artifacts").glob("*/layers/0.npz"))
    return found


def test_it_is_built_cached_and_served_and_answers_like_the_module(built: Path, module: nn.Module) -> None:
    folder = artifact_of(built)
    assert (folder / "between" / "activation.txt").read_text() == "relu"
    before = {path: path.stat().st_mtime_ns for path in (built / "cache" / "artifacts").rglob("*")}
    rows = np.random.default_rng(1).standard_normal((5, 6)).astype(np.float32)
    with torch.inference_mode():
        right = module(torch.from_numpy(rows)).numpy()
    for _ in range(2):
        with served(built) as (url, said):
            assert "side by side" not in said, "all of it comes from the cache"
            for variant in ("float", "numpy"):
                assert answers(url, rows, variant) == pytest.approx(right, abs=1e-4)
            page = httpx.get(url + "/metrics").text
            assert 'backend="numpy"' in page
            [told] = [line for line in page.splitlines() if line.startswith("leanserve_backend_facts_total{")]
            assert 'fact="macs"' in told
            assert float(told.split()[-1]) == 5 * (6 * 16 + 16 * 3)
    assert {path: path.stat().st_mtime_ns for path in (built / "cache" / "artifacts").rglob("*")} == before


@pytest.mark.soak
@pytest.mark.parametrize("name", ["layers/1.npz", "between/activation.txt"])
def test_damage_in_a_subfolder_is_noticed_and_mended(built: Path, name: str) -> None:
    path = artifact_of(built) / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = subprocess.run(command(built, "build"), capture_output=True, text=True, check=False, cwd=built)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{name}: sha256 is" in done.stdout + done.stderr
    assert (artifact_of(built) / name).read_bytes() == content
