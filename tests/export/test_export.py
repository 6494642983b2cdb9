"""A variant as files that run in a process which has no leanserve, and what is told where it cannot become one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from leanserve import upkeep
from leanserve.artifacts.benchmarks import BenchmarkResult, LaneRates, RatioInterval
from leanserve.artifacts.load import load_model
from leanserve.build import builder as build
from leanserve.build.progress import BuildProgress
from leanserve.context import AppContext
from leanserve.contracts import Array
from leanserve.errors import StartupError
from leanserve.evaluation.quality import GateOutputs
from leanserve.evaluation.speed import Stopwatch
from leanserve.export.writing import ExportForm, export_variant
from measurements import measurement

SOURCE = """
import torch
from torch import nn

INPUTS = ({"name": "frames", "dtype": "float32", "shape": (None, 16)},)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 4)

    def forward(self, frames):
        return self.second(self.first(frames).relu())


def tagger():
    torch.manual_seed(0)
    return Tagger()
"""
CONFIG = """\
base: {python: "tagging:tagger"}
data: {synthetic: 16}
variants:
  - name: float
  - name: int8
    passes: [{kind: quantize_dynamic}, {kind: onnxruntime}]
"""
ALONE = """
import runpy, sys
sys.modules["leanserve"] = None
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script as in an environment without leanserve: to import it would be an ImportError."""


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers and speed are measured in other tests."""

    def measure(_store: Any, base: Any, _recipe: Any, _reference: Any, hardware: Any) -> Any:
        here = {"cpu": hardware.cpu, "threads": hardware.threads, "score_digest": base.score_digest}
        return measurement().model_copy(update=here), GateOutputs((), None)

    def beside_anchor(stopwatch: Stopwatch, anchor: str, keys: list[str]) -> list[BenchmarkResult]:
        one = {1: RatioInterval(median=1.0, low=1.0, high=1.0)}
        machine = {"cpu": stopwatch.hardware.cpu, "threads": stopwatch.hardware.threads, "rounds": 7, "waited": 0.0}
        times: Any = {"latency_ms": {1: 1.0}, "anchor_ms": {1: 1.0}, "ratios": one, **machine}
        return [BenchmarkResult(key=key, anchor=anchor, **times) for key in keys]

    def lanes(stopwatch: Stopwatch, results: list[BenchmarkResult]) -> list[LaneRates]:
        machine: Any = {"cpu": stopwatch.hardware.cpu, "threads": stopwatch.hardware.threads}
        rates = {1: 100.0, stopwatch.hardware.threads: 100.0}
        return [LaneRates(key=item.key, rates=rates, **machine) for item in results]

    monkeypatch.setattr(build, "measure", measure)
    monkeypatch.setattr(Stopwatch, "beside_anchor", beside_anchor)
    monkeypatch.setattr(Stopwatch, "lanes", lanes)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("export")
    (folder / "tagging.py").write_text(SOURCE)
    (folder / "config.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        pretend(patch)
        work = AppContext(folder / "config.yaml", folder / "cache")
        with BuildProgress(Console(quiet=True), len(work.plan.keys) + 1).running() as progress:
            work.build(progress, 0.0)
    return work


def expected(work: AppContext, name: str, rows: Array) -> Array:
    report = next(report for report in work.reports() if report.name == name)
    model: Any = load_model(work.store, work.base, report.ancestry[-1].key)
    if model.format == "torch":
        import torch

        with torch.inference_mode():
            return np.asarray(model.module(torch.from_numpy(rows)))
    import onnxruntime

    return np.asarray(onnxruntime.InferenceSession(model.path).run(None, {"frames": rows})[0])


FORMS: dict[str, tuple[str, ExportForm | None, float]] = {
    "a torch module as ONNX": ("float", None, 1e-6),
    "a torch module as a program": ("float", "torch", 1e-6),
    "a torch module for OpenVINO": ("float", "openvino", 1e-5),
    "a quantized graph": ("int8", None, 1e-6),
}


@pytest.mark.parametrize("case", FORMS)
def test_it_runs_without_leanserve(work: AppContext, tmp_path: Path, case: str) -> None:
    name, form, tolerance = FORMS[case]
    if form == "openvino" and importlib.util.find_spec("openvino") is None:
        pytest.skip("the extra openvino is not installed")
    folder = tmp_path / "out"
    files = export_variant(work, name, folder, form)
    assert {*files} == {path.name for path in folder.iterdir()}
    rows = np.random.default_rng(1).standard_normal((3, 5, 16)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", frames=rows)
    show = "import numpy as np; np.set_printoptions(threshold=10**6, precision=9, floatmode='unique')\n"
    command = [sys.executable, "-c", show + ALONE, str(folder / "run.py"), str(tmp_path / "rows.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    head, _, printed = done.stdout.partition("\n")
    assert head == "output float32 [3, 5, 4]"
    given = np.array([float(word) for word in printed.replace("[", " ").replace("]", " ").split()]).reshape(3, 5, 4)
    np.testing.assert_allclose(given, expected(work, name, rows), rtol=0, atol=tolerance)
    told = json.loads((folder / "config.json").read_text())
    assert told["inputs"] == [{"name": "frames", "dtype": "float32", "shape": [None, 16]}]
    assert [item["kind"] for item in told["passes"]] == (["quantize_dynamic", "onnxruntime"] if name == "int8" else [])
    assert "python run.py rows.npz    # arrays frames float32 [any, 16]" in (folder / "README.md").read_text()


def test_random_rows_are_enough(work: AppContext, tmp_path: Path) -> None:
    export_variant(work, "int8", tmp_path / "out", None)
    command = [sys.executable, "-c", ALONE, str(tmp_path / "out" / "run.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.startswith("output float32 [2, 16, 4]\n")


def test_what_cannot_be_exported_is_told_and_leaves_nothing(work: AppContext, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="no variant 'fp8'; there are float, int8"):
        export_variant(work, "fp8", tmp_path / "out", None)
    with pytest.raises(
        StartupError, match=r"'int8' cannot be exported as torch: it is a graph for onnx .*--format onnx"
    ):
        export_variant(work, "int8", tmp_path / "out", "torch")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine.txt").touch()
    with pytest.raises(StartupError, match="is not empty"):
        export_variant(work, "int8", tmp_path, None)


def test_a_cache_is_listed_verified_and_pruned(work: AppContext) -> None:
    store = work.store
    listed = upkeep.stored_artifacts(store)
    assert {item.key for item in listed} == set(work.plan.keys)
    assert any(item.words == "tagging: quantize_dynamic" and item.bytes > 1000 for item in listed)
    assert upkeep.faults(store) == []
    assert upkeep.prune(store, work.plan.keys, 0, dry_run=False).artifacts == ()
    assert upkeep.prune(store, (), upkeep.DAY_S, dry_run=False).artifacts == (), "all of them are new"
    kept = work.plan.keys[:1]
    would = upkeep.prune(store, kept, 0, dry_run=True)
    assert {item.key for item in would.artifacts} == set(work.plan.keys[1:])
    assert would.notes, "their benchmarks"
    assert len(upkeep.stored_artifacts(store)) == len(listed)
    [weights] = store.folder(kept[0]).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    benchmark = next((store.root / "benchmarks").iterdir())
    benchmark.write_text("{}")
    faults = upkeep.faults(store)
    assert len(faults) == 2
    assert "sha256 is" in faults[0]
    assert upkeep.prune(store, kept, 0, dry_run=False) == would
    assert [item.fault[:1] != "" for item in upkeep.stored_artifacts(store)] == [True], "it is for a build to replace"
