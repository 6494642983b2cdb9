"""A cache that was damaged, mixed up or left half-written, and a start from it: nothing of it is believed.

One small config is built once, by the real builder (only its measurements are invented: they take minutes where others
have the cores); each test damages a copy of that cache. `make soak` builds and mends it by the real command.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from leanserve.artifacts.benchmarks import BenchmarkResult
from leanserve.bases.loaded import LoadedBase
from leanserve.build import builder
from leanserve.build.progress import BuildProgress
from leanserve.context import AppContext
from leanserve.evaluation.quality import GateOutputs
from leanserve.evaluation.speed import Stopwatch
from leanserve.start import ServiceStart
from leanserve.telemetry.startup import Startup
from measurements import measurement

CONFIG = """\
base: digits
threads: 1
variants:
  - name: float
  - name: onnx
    passes: [{kind: onnxruntime}]
"""
AT_ONCE_S = 10.0
"""Far less than whoever waits for a FIFO would take; a look at the cache takes 0.1 s on a machine of its own."""


def build(config: Path, cache: Path) -> str:
    """What `leanserve build` says; as a user whose files others of the group may read."""
    command = [sys.executable, "-m", "leanserve", "build", "--config", str(config), "--cache", str(cache)]
    ran = subprocess.run(command, capture_output=True, text=True, umask=0o027, timeout=280, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


def build_unmeasured(config: Path, cache: Path) -> None:
    """The same in this process, in a second."""
    context = AppContext(config, cache)
    machine = {"cpu": context.hardware.cpu, "threads": context.threads}
    measured = measurement().model_copy(update={"score_digest": context.base.score_digest, **machine})

    def timed(_: Stopwatch, anchor: str, keys: Sequence[str]) -> list[BenchmarkResult]:
        speed = {"latency_ms": {1: 1.0}, "anchor_ms": {1: 1.0}, "ratios": {1: {"median": 1.0, "low": 1.0, "high": 1.0}}}
        told = {"anchor": anchor, "rounds": 7, "waited": 0.0} | machine | speed
        return [BenchmarkResult.model_validate({"key": key} | told) for key in keys]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "measure", lambda *_: (measured, GateOutputs((), None)))
        patch.setattr(Stopwatch, "beside_anchor", timed)
        progress = BuildProgress(Console(file=io.StringIO()), len(context.plan.keys))
        builder.Builder(context.store, context.config, context.base, context.hardware, progress).build(context.plan)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "service.yaml").write_text(CONFIG)
    before = os.umask(0o027)
    try:
        build_unmeasured(folder / "service.yaml", folder / "built")
    finally:
        os.umask(before)
    return folder


@pytest.fixture
def cache(place: Path, tmp_path: Path) -> Path:
    shutil.copytree(place / "built", tmp_path / "cache")
    return tmp_path / "cache"


def opened(place: Path, cache: Path) -> AppContext:
    """What a start finds out before it builds or serves."""
    began = time.monotonic()
    context = AppContext(place / "service.yaml", cache)
    assert time.monotonic() - began < AT_ONCE_S
    return context


def change_a_digit(path: Path, after: bytes = b"") -> None:
    """Another digit in the place of the last one of the first number behind `after`, and nothing else."""
    text = path.read_bytes()
    start = text.index(after) + len(after)
    found = re.search(rb"\d(?=[,\s\]}])", text[start:])
    assert found is not None
    position = start + found.start()
    path.write_bytes(text[:position] + (b"7" if text[position : position + 1] != b"7" else b"3") + text[position + 1 :])


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def artifacts(cache: Path) -> tuple[Path, Path]:
    """The folder of the base, and that of the variant `onnx`."""
    told = {path: json.loads((path / "manifest.json").read_text()) for path in (cache / "artifacts").iterdir()}
    base, variant = sorted(told, key=lambda path: told[path]["document"]["kind"] is not None)
    return base, variant


def model_file(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.suffix != ".json")


FILES: dict[str, Callable[[Path], Path]] = {
    "manifest": lambda cache: artifacts(cache)[1] / "manifest.json",
    "quality": lambda cache: artifacts(cache)[1] / "quality.json",
    "model": lambda cache: model_file(artifacts(cache)[1]),
    "benchmark": lambda cache: min(path for path in (cache / "benchmarks").iterdir() if "lanes" not in path.name),
}
"""What a start must not believe when it is damaged."""


def test_an_intact_cache_lacks_nothing(place: Path, cache: Path) -> None:
    assert opened(place, cache).missing is None


@pytest.mark.parametrize("name", FILES)
def test_one_changed_digit_is_noticed(place: Path, cache: Path, name: str) -> None:
    path = FILES[name](cache)
    change_a_byte(path) if name == "model" else change_a_digit(path, b'"document"')
    missing = opened(place, cache).missing
    assert missing is not None
    assert str(path) in missing


def test_one_changed_digit_in_what_is_known_of_the_base_is_noticed(
    place: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was 10 % accuracy and "passes its gate": the images were scaled by another number."""
    (note,) = (cache / "bases").iterdir()
    intact = opened(place, cache).base
    assert isinstance(intact, LoadedBase)
    change_a_digit(note, b'"std": [')
    found = opened(place, cache).base
    assert "damaged note is written again" in caplog.text
    assert isinstance(found, LoadedBase)
    assert (found.codec, found.digest) == (intact.codec, intact.digest)
    caplog.clear()
    opened(place, cache)
    assert not caplog.text


def test_a_copied_folder_does_not_serve_another_variant(place: Path, cache: Path) -> None:
    base, variant = artifacts(cache)
    shutil.rmtree(variant)
    shutil.copytree(base, variant)
    missing = opened(place, cache).missing
    assert missing is not None
    assert f"belongs to {base.name[:12]}, not to {variant.name[:12]}" in missing


def test_a_copied_measurement_is_not_believed(place: Path, cache: Path) -> None:
    base, variant = artifacts(cache)
    shutil.copy(base / "quality.json", variant / "quality.json")
    assert "it was copied here" in str(opened(place, cache).missing)
    shutil.copytree(place / "built", cache, dirs_exist_ok=True)
    one, other = [path for path in sorted((cache / "benchmarks").iterdir()) if "lanes" not in path.name]
    shutil.copy(one, other)
    assert "it was copied here" in str(opened(place, cache).missing)


def stand_in(path: Path, kind: str) -> None:
    """Something else in the place of a file."""
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
@pytest.mark.parametrize("name", [*FILES, "base"])
def test_what_is_no_file_is_an_error_at_once(
    place: Path, cache: Path, name: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = next((cache / "bases").iterdir()) if name == "base" else FILES[name](cache)
    stand_in(path, kind)
    missing = opened(place, cache).missing
    if name == "base":
        assert missing is None
        assert f"{path}: cannot be read" in caplog.text
    else:
        assert f"{path}: cannot be read" in str(missing)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["fifo", "file"])
def test_what_is_no_folder_is_an_error_at_once(place: Path, cache: Path, kind: str) -> None:
    variant = artifacts(cache)[1]
    shutil.rmtree(variant)
    os.mkfifo(variant) if kind == "fifo" else variant.write_text("")
    assert f"{variant / 'manifest.json'}: cannot be read" in str(opened(place, cache).missing)


def test_what_dead_builders_left_is_swept_by_a_start_that_builds_nothing(place: Path, cache: Path) -> None:
    base, variant = artifacts(cache)
    half = cache / "tmp" / f"{variant.name}.0123456789abcdef"
    half.mkdir()
    (half / "model.onnx").write_bytes(b"half")
    (cache / "tmp" / f"{base.name}.4711.npz").write_bytes(b"half")
    (cache / "scratch" / base.name).mkdir()
    started = ServiceStart(place / "service.yaml", cache, opened(place, cache).config)
    warm = started.run()
    try:
        assert list(warm.variants) == ["float", "onnx"]
    finally:
        warm.close()
    assert not [*(cache / "tmp").iterdir(), *(cache / "scratch").iterdir()]


def test_the_group_may_read_all_of_it(place: Path) -> None:
    built = place / "built"
    closed = [path for path in built.rglob("*") if not path.stat().st_mode & 0o040]
    assert not closed
    assert all(path.stat().st_mode & 0o010 for path in built.rglob("*") if path.is_dir())


def accuracy(context: AppContext) -> dict[str, float]:
    """Of every variant that a start would serve, on real digits."""
    from leanserve_models.digits import data

    (images,), labels = data("test", 200)
    warm = context.open_variants(Startup(variant.name for variant in context.config.variants))
    try:
        answers = {name: variant.running.backends[0].run((images,)) for name, variant in warm.variants.items()}
        return {name: float(np.mean(found.outputs[0].argmax(1) == labels)) for name, found in answers.items()}
    finally:
        warm.close()


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("damage", [*FILES, "base", "copied"])
def test_a_build_mends_it_and_all_variants_answer_right(place: Path, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    build(place / "service.yaml", cache)
    base, variant = artifacts(cache)
    if damage == "copied":
        shutil.rmtree(variant)
        shutil.copytree(base, variant)
    elif damage == "base":
        change_a_digit(next((cache / "bases").iterdir()), b'"std": [')
    elif damage == "model":
        change_a_byte(FILES[damage](cache))
    else:
        change_a_digit(FILES[damage](cache), b'"document"')
    said = build(place / "service.yaml", cache)
    assert "damaged" in said
    context = opened(place, cache)
    assert context.missing is None
    assert all(share > 0.9 for share in accuracy(context).values())
