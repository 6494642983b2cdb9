"""A build on a busy machine: its ratios are those of a quiet one, or they are marked. Minutes long: `make soak`."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from leanserve.artifacts.manifest import Quality
from leanserve.context import AppContext

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3000)]
CONFIG = """
base: digits
gate: {on_fail: exclude}
variants:
  - {name: float}
  - {name: onnx, passes: [{kind: fold_bn}, {kind: onnxruntime}]}
  - {name: int8, passes: [{kind: fold_bn}, {kind: quantize_static}, {kind: onnxruntime}]}
"""
LOOPS = 2


@contextmanager
def busy(loops: int) -> Iterator[None]:
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for loop in running:
            loop.kill()
            loop.wait()


def built(folder: Path) -> dict[str, Quality]:
    """What a build measures of every variant, in a new cache."""
    folder.mkdir()
    (folder / "c.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "leanserve", "build", "--config", "c.yaml", "--cache", "cache"]
    started = time.perf_counter()
    subprocess.run([*command, "--measure-seconds", "60"], cwd=folder, check=True)
    found = {item.name: item.quality for item in AppContext(folder / "c.yaml", folder / "cache").reports()}
    told = {name: [quality.speedup, quality.waited] for name, quality in found.items()}
    sys.stdout.write(f"{time.perf_counter() - started:.0f} s: {json.dumps(told)}\n")
    return found


def test_ratios_beside_two_busy_loops_are_those_of_a_quiet_machine_or_marked(tmp_path: Path) -> None:
    quiet = built(tmp_path / "quiet")
    with busy(LOOPS):
        loaded = built(tmp_path / "loaded")
    for name, quality in loaded.items():
        near = quality.speedup == pytest.approx(quiet[name].speedup, rel=0.25)
        assert near or quality.disturbed, (
            f"{name}: {quality.speedup:.2f} beside other work, {quiet[name].speedup:.2f} quiet"
        )
