"""The artifact store: whole or not at all, checked byte by byte, one builder at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from leanserve.artifacts.benchmarks import BenchmarkResult, BenchmarkSet, LaneRates, RatioInterval
from leanserve.artifacts.manifest import Measurement, Recipe
from leanserve.artifacts.store import ArtifactStore, checksums
from leanserve.contracts import ModelSpec
from leanserve.errors import ArtifactCorrupt, PassFailed, StartupError
from leanserve.hardware import this_hardware
from measurements import measurement

KEY = "a" * 64


def recipe_of(key: str, files: dict[str, str], parents: tuple[str, ...] = ()) -> Recipe:
    return Recipe(
        key=key,
        parents=parents,
        base="tiny",
        kind=None if not parents else "fold_bn",
        options={},
        decisions={},
        facts={},
        simulated=False,
        format="onnx",
        spec=ModelSpec((), ()),
        files=files,
        parameters=1,
        macs=1,
        seconds=0.5,
        versions={},
        hardware=this_hardware(),
    )


def result(key: str, latency_ms: dict[int, float] | None = None, anchor: str | None = None) -> BenchmarkResult:
    """As fast as its anchor."""
    ms = latency_ms or {1: 2.0}
    ratios = {rows: RatioInterval(median=1.0, low=0.9, high=1.1) for rows in ms}
    return BenchmarkResult(
        key=key, anchor=anchor or key, cpu="x", threads=1, latency_ms=ms, anchor_ms=ms, ratios=ratios, rounds=7,
        waited=0.0,
    )  # fmt: skip


def publish(store: ArtifactStore, key: str = KEY, parents: tuple[str, ...] = ()) -> None:
    with store.lock(key), store.workspace(key) as folder:
        (folder / "model.onnx").write_bytes(os.urandom(1000))
        store.publish(folder, recipe_of(key, checksums(folder), parents))


def test_published_is_found_again_with_its_measurement(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    assert store.recipe(KEY) is None
    timed = BenchmarkSet("x", 1, KEY, {KEY: result(KEY, {1: 2.0, 8: 4.0})}, {})
    assert store.manifest(KEY, timed) is None
    publish(store)
    assert store.manifest(KEY, timed) is None  # made, but not measured yet
    store.attach(KEY, measurement())
    manifest = store.manifest(KEY, timed)
    assert manifest is not None
    assert (manifest.base, manifest.cpu, manifest.quality.throughput) == ("tiny", "x", 2000)
    assert store.manifest(KEY, replace(timed, cpu="another machine")) is None
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json"])
@pytest.mark.parametrize("position", [0, 150, -2])
def test_any_flipped_byte_is_noticed(tmp_path: Path, name: str, position: int) -> None:
    store = ArtifactStore(tmp_path)
    publish(store)
    path = store.folder(KEY) / name
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactCorrupt, match=name):
        store.recipe(KEY)
    store.discard(KEY)
    assert store.recipe(KEY) is None


def test_documents_are_plain_json(tmp_path: Path) -> None:
    """For `jq` and for eyes: what is told of an artifact is no text within a text."""
    store = ArtifactStore(tmp_path)
    publish(store)
    store.attach(KEY, measurement())
    for name in ("manifest.json", "quality.json"):
        told = json.loads((store.folder(KEY) / name).read_text())
        assert told["key"] == KEY
    assert told["document"]["fidelity"]["score"] == measurement().fidelity.score
    text = (store.folder(KEY) / "quality.json").read_bytes()
    blank = re.sub(rb'"sha256": "[0-9a-f]{64}"', b'"sha256": "' + b"0" * 64 + b'"', text)
    assert hashlib.sha256(blank).hexdigest() == told["sha256"], "anybody can check it"


def test_a_damaged_measurement_is_noticed(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    publish(store)
    assert store.measurement(KEY) is None
    store.attach(KEY, measurement())
    path = store.folder(KEY) / "quality.json"
    path.write_bytes(path.read_bytes().replace(b"x", b"y", 1))
    with pytest.raises(ArtifactCorrupt, match="does not match its checksum"):
        store.measurement(KEY)


def test_a_measurement_of_another_version_is_noticed(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    publish(store)
    store.attach(KEY, measurement().model_copy(update={"fidelity": None}))
    with pytest.raises(ArtifactCorrupt, match="another version"):
        store.measurement(KEY)


def test_what_was_copied_from_another_artifact_is_not_believed(tmp_path: Path) -> None:
    store, other = ArtifactStore(tmp_path), "b" * 64
    for key in (KEY, other):
        publish(store, key)
        store.attach(key, measurement())
    shutil.copy(store.folder(other) / "quality.json", store.folder(KEY) / "quality.json")
    with pytest.raises(ArtifactCorrupt, match=f"belongs to {other[:12]}, not to {KEY[:12]}"):
        store.measurement(KEY)
    shutil.rmtree(store.folder(KEY))
    shutil.copytree(store.folder(other), store.folder(KEY))
    with pytest.raises(ArtifactCorrupt, match=f"belongs to {other[:12]}, not to {KEY[:12]}"):
        store.recipe(KEY)


def test_latencies_of_other_artifacts_or_another_machine_are_not_believed(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.keep_benchmark(result("a"))
    (kept,) = (tmp_path / "benchmarks").iterdir()
    store.keep_benchmark(result("a").model_copy(update={"threads": 2}))
    (other,) = set((tmp_path / "benchmarks").iterdir()) - {kept}
    assert sorted(store.machines("a")) == [("x", 1), ("x", 2)]
    shutil.copy(kept, other)
    with pytest.raises(ArtifactCorrupt, match="copied here"):
        store.benchmark("a", "a", "x", 2)
    assert store.machines("a") == [("x", 1)]
    rates = LaneRates(key="a", cpu="x", threads=2, rates={1: 10.0, 2: 12.0})
    store.keep_lane_rates(rates)
    assert (store.lane_rates("a", "x", 2), store.lane_rates("a", "y", 2)) == (rates, None)
    assert store.machines("a") == [("x", 1)], "a machine is one where the anchor was timed"


def stand_in(path: Path, kind: str) -> None:
    """Put something else in the place of a file."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path.with_name("nowhere"))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "dangling link"])
def test_what_is_no_file_is_an_error_at_once(tmp_path: Path, kind: str) -> None:
    store = ArtifactStore(tmp_path)
    for name in ("model.onnx", "manifest.json"):
        publish(store)
        stand_in(store.folder(KEY) / name, kind)
        with pytest.raises(ArtifactCorrupt, match=rf"{name}: cannot be read"):
            store.recipe(KEY)
        store.discard(KEY)
    publish(store)
    stand_in(store.folder(KEY) / "quality.json", kind)
    with pytest.raises(ArtifactCorrupt, match="cannot be read"):
        store.measurement(KEY)
    store.attach(KEY, measurement())
    assert store.measurement(KEY) == measurement()
    store.keep_benchmark(result(KEY))
    stand_in(next((tmp_path / "benchmarks").iterdir()), kind)
    with pytest.raises(ArtifactCorrupt, match="cannot be read"):
        store.benchmark(KEY, KEY, "x", 1)
    store.keep_benchmark(result(KEY))
    assert store.benchmark(KEY, KEY, "x", 1) == result(KEY)
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_something_else_in_the_place_of_an_artifact_or_its_lock_blocks_nobody(tmp_path: Path, kind: str) -> None:
    store = ArtifactStore(tmp_path)
    stand_in(store.folder(KEY), kind)
    with pytest.raises(ArtifactCorrupt):
        store.recipe(KEY)
    store.discard(KEY)
    stand_in(tmp_path / "locks" / KEY, kind)
    if kind == "folder":
        with pytest.raises(StartupError, match="Is a directory"):
            publish(store)
    else:
        publish(store)
        assert store.recipe(KEY) is not None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_does_not_have_is_refused_when_it_is_written(tmp_path: Path, value: float) -> None:
    store = ArtifactStore(tmp_path)
    with store.workspace(KEY) as folder, pytest.raises(PassFailed, match=r"cannot be stored: facts\.gain is"):
        store.publish(folder, recipe_of(KEY, {}).model_copy(update={"facts": {"gain": value}}))
    publish(store)
    odd = measurement().fidelity.model_copy(update={"score": value})
    with pytest.raises(PassFailed, match=r"cannot be stored: fidelity\.score is"):
        store.attach(KEY, Measurement(fidelity=odd, score_digest="", cpu="x", threads=1))
    assert store.measurement(KEY) is None
    with pytest.raises(PassFailed, match=r"cannot be stored: latency_ms\.1 is"):
        store.keep_benchmark(result(KEY, {1: value}))
    assert not list((tmp_path / "tmp").iterdir())


def test_what_dead_builders_left_is_swept_and_what_live_ones_do_is_not(tmp_path: Path) -> None:
    store, other = ArtifactStore(tmp_path), "b" * 64
    publish(store)
    for key in (KEY, other):
        (store.scratch(key) / "checkpoint").write_bytes(b"epoch 3")
        (tmp_path / "tmp" / f"{key}.left").mkdir()
    (tmp_path / "tmp" / "benchmark.left").write_text("half")
    alive = ArtifactStore(tmp_path)
    with store.lock(other), store.workspace(other) as folder:
        (tmp_path / "tmp" / f"{other}.too").mkdir()
        alive.sweep()
        assert {path.name for path in (tmp_path / "tmp").iterdir()} == {folder.name, f"{other}.too"}
    alive.sweep()
    assert not list((tmp_path / "tmp").iterdir())
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == [other], "an interrupted pass resumes"


def test_a_checkpoint_that_nobody_went_on_from_is_swept(tmp_path: Path) -> None:
    store, other = ArtifactStore(tmp_path), "b" * 64
    for key, days in ((KEY, 31), (other, 29)):
        checkpoint = store.scratch(key) / "checkpoint"
        checkpoint.write_bytes(b"epoch 3")
        for path in (checkpoint, checkpoint.parent):
            os.utime(path, (time.time() - days * 86_400,) * 2)
    store.sweep()
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == [other]


def test_what_cannot_be_told_to_be_stale_stays(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    (tmp_path / "tmp" / f"{KEY}.left").mkdir()
    (tmp_path / "locks" / KEY).mkdir()
    store.sweep()
    assert (tmp_path / "tmp" / f"{KEY}.left").exists()


def test_others_may_read_what_was_published(tmp_path: Path) -> None:
    """A cache is built by one user and served by another."""
    before = os.umask(0o022)
    try:
        store = ArtifactStore(tmp_path)
        publish(store)
        store.attach(KEY, measurement())
    finally:
        os.umask(before)
    assert store.folder(KEY).stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in store.folder(KEY).iterdir()} == {0o644}


def test_latencies_belong_to_an_artifact_its_anchor_and_a_machine(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    store.keep_benchmark(result("b", anchor="a"))
    assert store.benchmark("b", "a", "x", 1) == result("b", anchor="a")
    for key, anchor, cpu, threads in (("a", "b", "x", 1), ("b", "b", "x", 1), ("b", "a", "y", 1), ("b", "a", "x", 2)):
        assert store.benchmark(key, anchor, cpu, threads) is None


def test_a_missing_file_or_parent_is_noticed(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    publish(store, parents=("b" * 64,))
    with pytest.raises(ArtifactCorrupt, match="missing"):
        store.ancestry(KEY)
    (store.folder(KEY) / "model.onnx").unlink()
    with pytest.raises(ArtifactCorrupt, match=r"model\.onnx"):
        store.recipe(KEY)


def _die_half_way(root: Path, ready: Path) -> None:
    store = ArtifactStore(root)
    with store.lock(KEY), store.workspace(KEY) as folder:
        (folder / "model.onnx").write_bytes(b"half")
        (store.scratch(KEY) / "checkpoint").write_bytes(b"epoch 3")
        ready.touch()
        time.sleep(60)


def test_kill_9_while_writing_leaves_nothing_that_could_be_served(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    child = multiprocessing.get_context("spawn").Process(target=_die_half_way, args=(tmp_path / "cache", ready))
    child.start()
    deadline = time.monotonic() + 30
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()

    store = ArtifactStore(tmp_path / "cache")
    assert store.recipe(KEY) is None
    assert list((store.root / "tmp").iterdir())
    assert (store.scratch(KEY) / "checkpoint").read_bytes() == b"epoch 3"  # training resumes
    publish(store)  # the dead builder's lock is free
    assert store.recipe(KEY) is not None
    assert not list((store.root / "tmp").iterdir())
    assert not list((store.root / "scratch").iterdir())


def _build_once(root: Path) -> None:
    store = ArtifactStore(root)
    with store.lock(KEY):
        if store.recipe(KEY) is None:
            with (root / "builds").open("a") as log:
                log.write("built\n")
            time.sleep(0.2)
            with store.workspace(KEY) as folder:
                (folder / "model.onnx").write_bytes(b"weights")
                store.publish(folder, recipe_of(KEY, checksums(folder)))


def test_two_builders_at_once_build_once(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    children = [spawn.Process(target=_build_once, args=(tmp_path,)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert (tmp_path / "builds").read_text() == "built\n"
    assert ArtifactStore(tmp_path).recipe(KEY) is not None


def test_a_cache_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match=r"cannot be created \(Not a directory\); set 'cache' or LEANSERVE_CACHE"):
        ArtifactStore(tmp_path / "file")
    with pytest.raises(StartupError, match=r"cannot be created"):
        ArtifactStore(Path("/proc/leanserve"))


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = ArtifactStore(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StartupError, match=r"cannot be written .*No space left on device.*make room"):
        publish(store)
    assert store.recipe(KEY) is None
