"""The artifact store: whole or not at all, checked byte by byte, one builder at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from service.compression.artifacts import ArtifactStore, checksums
from service.compression.manifest import Fidelity, Measurement, OutputFidelity, Recipe, SideBySide
from service.errors import ArtifactCorrupt, StartupError
from service.machine import cpu_name

KEY = "a" * 64


def recipe_of(key: str, files: dict[str, str], parent: str | None = None) -> Recipe:
    return Recipe(
        key=key,
        parent=parent,
        base="tiny",
        kind=None if parent is None else "fold_bn",
        options={},
        decisions={},
        facts={},
        simulated=False,
        files=files,
        parameters=1,
        macs=1,
        seconds=0.5,
        versions={},
        isa=[],
    )


def measurement() -> Measurement:
    found = Fidelity(
        samples=1,
        score=None,
        score_low=None,
        score_high=None,
        agreement=1.0,
        outputs=(OutputFidelity(name="y", meaning="values", agreement=1.0, error=0.0, channel=0, not_finite=0),),
        batch_dependence=0.0,
        disk_bytes=1,
        parameters=1,
        macs=1,
        peak_memory_bytes=1,
    )
    return Measurement(fidelity=found, cpu="x", threads=1)


def publish(store: ArtifactStore, key: str = KEY, parent: str | None = None) -> None:
    with store.lock(key), store.workspace(key) as folder:
        (folder / "model.onnx").write_bytes(os.urandom(1000))
        store.publish(folder, recipe_of(key, checksums(folder), parent))


def test_published_is_found_again_with_its_measurement(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    assert store.recipe(KEY) is None
    race = SideBySide(cpu="x", threads=1, latency_ms={KEY: {1: 2.0, 8: 4.0}}, lane_rates={})
    assert store.manifest(KEY, race) is None
    publish(store)
    assert store.manifest(KEY, race) is None  # made, but not measured yet
    store.attach(KEY, measurement())
    manifest = store.manifest(KEY, race)
    assert manifest is not None
    assert (manifest.base, manifest.cpu, manifest.quality.throughput) == ("tiny", "x", 2000)
    assert store.manifest(KEY, race.model_copy(update={"cpu": "another machine"})) is None
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


def test_a_damaged_measurement_is_measured_again(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    publish(store)
    store.attach(KEY, measurement())
    path = store.folder(KEY) / "quality.json"
    path.write_bytes(path.read_bytes().replace(b"x", b"y", 1))
    assert store.measurement(KEY) is None


def test_a_measurement_of_another_version_is_measured_again(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    publish(store)
    store.attach(KEY, measurement().model_copy(update={"fidelity": None}))
    assert store.measurement(KEY) is None


def test_latencies_belong_to_the_set_of_artifacts_they_were_measured_with(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    race = SideBySide(cpu=cpu_name(), threads=2, latency_ms={"a": {1: 2.0}, "b": {1: 4.0}}, lane_rates={})
    store.keep_side_by_side(["a", "b"], race)
    assert store.side_by_side(["b", "a"], 2) == race
    assert store.side_by_side(["a"], 2) is None
    assert store.side_by_side(["a", "b"], 1) is None


def test_a_missing_file_or_parent_is_noticed(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    publish(store, parent="b" * 64)
    with pytest.raises(ArtifactCorrupt, match="missing"):
        store.chain(KEY)
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


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="LEANSERVE_CACHE"):
        ArtifactStore(tmp_path / "file")
