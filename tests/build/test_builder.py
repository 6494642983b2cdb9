"""A build from a cache: what is damaged is made again with a message, and a read-only cache serves as it is."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from leanserve.artifacts import store as artifacts
from leanserve.artifacts.benchmarks import QUIET, BenchmarkResult, LaneRates, RatioInterval
from leanserve.artifacts.load import load_model
from leanserve.artifacts.manifest import Recipe
from leanserve.artifacts.store import ArtifactStore
from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.build import builder as build
from leanserve.build import plan as planning
from leanserve.build.progress import BuildProgress
from leanserve.config.schema import ServiceConfig
from leanserve.config.variant_section import VariantConfig
from leanserve.contracts import TorchModel
from leanserve.evaluation.quality import GateOutputs
from leanserve.evaluation.speed import Stopwatch
from leanserve.hardware import Hardware, cpu_name, this_hardware
from leanserve.passes.families.runtime.channels_last import ChannelsLast
from leanserve.runtime.formats.torch import WEIGHTS
from measurements import measurement
from tiny_base import TinyBase, tiny_base

CONFIG = ServiceConfig.model_validate(
    {"base": "tiny", "variants": [{"name": "float"}, {"name": "folded", "passes": [{"kind": "fold_bn"}]}]}
)


@pytest.fixture(scope="module")
def base() -> TinyBase:
    return tiny_base()


def timed(key: str, anchor: str, cpu: str, threads: int) -> BenchmarkResult:
    """Twice as fast as the anchor, unless it is the anchor."""
    ratio = 1.0 if key == anchor else 0.5
    interval = RatioInterval(median=ratio, low=ratio, high=ratio)
    return BenchmarkResult(
        key=key, anchor=anchor, cpu=cpu, threads=threads,
        latency_ms={1: 2.0 * ratio}, anchor_ms={1: 2.0}, ratios={1: interval}, rounds=7, waited=0.0,
    )  # fmt: skip


def lanes(key: str, cpu: str, threads: int) -> LaneRates:
    return LaneRates(key=key, cpu=cpu, threads=threads, rates={1: 100.0, threads: 130.0})


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was measured, by key; measuring itself is done in other tests."""
    seen: list[object] = []

    def measure(_store: object, base: TinyBase, recipe: Recipe, _reference: object, hardware: Hardware) -> object:
        seen.append(recipe.key)
        here = {"cpu": hardware.cpu, "threads": hardware.threads, "score_digest": base.score_digest}
        return measurement().model_copy(update=here), GateOutputs((), None)

    def beside_anchor(stopwatch: Stopwatch, anchor: str, keys: list[str]) -> list[BenchmarkResult]:
        seen.append(("timed", *keys))
        return [timed(key, anchor, stopwatch.hardware.cpu, stopwatch.hardware.threads) for key in keys]

    def side_by_side(stopwatch: Stopwatch, results: list[BenchmarkResult]) -> list[LaneRates]:
        seen.append(("lanes", *(result.key for result in results)))
        return [lanes(result.key, stopwatch.hardware.cpu, stopwatch.hardware.threads) for result in results]

    monkeypatch.setattr(build, "measure", measure)
    monkeypatch.setattr(Stopwatch, "beside_anchor", beside_anchor)
    monkeypatch.setattr(Stopwatch, "lanes", side_by_side)
    return seen


def built(
    root: Path, base: TinyBase, config: ServiceConfig = CONFIG, threads: int = 1
) -> tuple[ArtifactStore, planning.Plan, str]:
    """The store, the plan, and what the progress said."""
    store, work, said = ArtifactStore(root), planning.plan(config, base, this_hardware()), io.StringIO()
    progress = BuildProgress(Console(file=said, width=400), len(work.keys))
    before = torch.get_num_threads()
    try:
        build.Builder(store, config, base, this_hardware(threads), progress).build(work)
    finally:
        torch.set_num_threads(before)
    return store, work, said.getvalue()


def test_what_was_timed_beside_other_work_is_timed_again_by_the_next_build(
    tmp_path: Path, base: TinyBase, measured: list[object]
) -> None:
    store, work, _ = built(tmp_path, base)
    first, last = work.keys
    known = store.benchmark(last, first, cpu_name(), 1)
    assert known is not None
    for waited, kept in ((0.9, 0.0), (QUIET + 0.1, 0.0)):
        store.keep_benchmark(known.model_copy(update={"waited": waited}))
        measured.clear()
        assert planning.shortfall(store, work, this_hardware(1)) is None, "a start uses what there is"
        built(tmp_path, base)
        assert measured == [("timed", last)]
        again = store.benchmark(last, first, cpu_name(), 1)
        assert again is not None
        assert again.waited == kept


def test_another_start_on_the_same_hardware_measures_nothing(
    tmp_path: Path, base: TinyBase, measured: list[object]
) -> None:
    built(tmp_path / "there", base)
    shutil.copytree(tmp_path / "there", tmp_path / "here")
    measured.clear()
    store, work, _ = built(tmp_path / "here", base)
    assert measured == []
    assert planning.shortfall(store, work, this_hardware(1)) is None


def test_answers_that_were_scored_by_another_score_are_measured_again_and_nothing_is_built(
    tmp_path: Path, base: TinyBase, measured: list[object]
) -> None:
    store, work, _ = built(tmp_path, base)
    other = replace(base, score_digest="of another score")
    changed = planning.plan(CONFIG, other, this_hardware())
    assert changed.keys == work.keys
    measured.clear()
    assert "not measured" in (planning.shortfall(store, changed, this_hardware(1)) or "")
    built(tmp_path, other)
    assert measured == list(work.keys)


def test_damaged_documents_are_made_again_with_a_message(
    tmp_path: Path, base: TinyBase, measured: list[object]
) -> None:
    store, work, said = built(tmp_path, base)
    first, last = work.keys
    assert measured == [first, last, ("timed", first, last)]
    assert "damaged" not in said
    assert planning.shortfall(store, work, this_hardware(1)) is None

    measured.clear()
    (store.folder(last) / "quality.json").write_bytes((store.folder(first) / "quality.json").read_bytes())
    assert "belongs to" in (planning.shortfall(store, work, this_hardware(1)) or "")
    _, _, said = built(tmp_path, base)
    assert f"damaged measurement is taken again: {store.folder(last)}/quality.json: belongs to" in said
    assert measured == [first, last], "the base gives the answers to compare with"

    measured.clear()
    next((tmp_path / "benchmarks").glob(f"{last}.*")).write_text("{}")
    _, _, said = built(tmp_path, base)
    assert "damaged measurement is taken again" in said
    assert measured == [("timed", last)], "beside the base; the base's own result stands"

    measured.clear()
    (store.folder(last) / "manifest.json").write_text("null")
    _, _, said = built(tmp_path, base)
    assert f"damaged artifact is rebuilt: {store.folder(last)}/manifest.json" in said
    assert measured == [first, last], "the base gives the answers to compare with"
    assert planning.shortfall(store, work, this_hardware(1)) is None


def test_one_more_variant_times_itself_and_nothing_else(tmp_path: Path, base: TinyBase, measured: list[object]) -> None:
    store, work, _ = built(tmp_path, base, threads=2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "benchmarks").iterdir()}
    assert len(before) == 4, "the base and a variant, each with lanes"
    more = ServiceConfig(
        base=CONFIG.base, variants=(*CONFIG.variants, VariantConfig(name="more", passes=(ChannelsLast(),)))
    )
    measured.clear()
    _, work, _ = built(tmp_path, base, more, threads=2)
    new = work.keys[-1]
    assert measured[-3:] == [new, ("timed", new), ("lanes", new)]
    assert before.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "benchmarks").iterdir()}.items()
    assert planning.shortfall(store, work, this_hardware(2)) is None
    next((tmp_path / "benchmarks").glob(f"lanes-{new}.*")).unlink()
    assert (
        planning.shortfall(store, work, this_hardware(2)) == "the gain of several lanes is not measured on this machine"
    )


def test_what_is_missing_is_named(tmp_path: Path, base: TinyBase) -> None:
    store, work, _ = built(tmp_path / "cache", base)
    empty = ArtifactStore(tmp_path / "empty")
    assert planning.shortfall(empty, work, this_hardware(1)) == "float: base is not built"
    store.discard(work.keys[1])
    assert planning.shortfall(store, work, this_hardware(1)) == "folded: fold_bn is not built"
    store, work, _ = built(tmp_path / "cache", base)
    assert planning.shortfall(store, work, this_hardware(2)) == "float: base is not measured on this machine"


@pytest.fixture
def sealed_cache(tmp_path: Path, base: TinyBase, monkeypatch: pytest.MonkeyPatch) -> Iterator[ArtifactStore]:
    """A whole cache that says it cannot be written; nothing in it has changed in the end."""

    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))}

    built(tmp_path, base)
    before = state()
    monkeypatch.setattr(artifacts, "may_write", lambda _: False)
    yield ArtifactStore(tmp_path)
    assert state() == before


def test_a_read_only_cache_serves_with_the_numbers_of_another_machine(
    sealed_cache: ArtifactStore, base: TinyBase
) -> None:
    work = planning.plan(CONFIG, base, this_hardware())
    assert planning.machines(sealed_cache, work, this_hardware(1)) == []
    assert planning.shortfall(sealed_cache, work, this_hardware(4)) is None
    assert planning.machines(sealed_cache, work, this_hardware(4)) == [f"{cpu_name()} with 1 thread"]
    ancestry = planning.reports(sealed_cache, CONFIG, work, this_hardware(4))[1].ancestry
    assert [(manifest.threads, manifest.quality.throughput) for manifest in ancestry] == [(1, 500.0), (1, 1000.0)]
    found = planning.stored_benchmark(sealed_cache, work, this_hardware(4))
    assert found is not None
    assert found.best_lanes(work.served, 4, self_contained=False) == 1, "lanes were not measured there"


def test_of_other_machines_one_with_as_many_threads_is_taken(
    tmp_path: Path, base: TinyBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, work, _ = built(tmp_path, base)
    for cpu, threads in (("A", 2), ("B", 4), ("C", 2)):
        for key in work.keys:
            store.keep_benchmark(timed(key, work.anchor, cpu, threads))
        for key in work.served[: 1 if cpu == "A" else 2]:
            store.keep_lane_rates(lanes(key, cpu, threads))
    assert planning.stored_benchmark(store, work, this_hardware(4)) is None, (
        "where it can be written, it is measured here"
    )
    monkeypatch.setattr(artifacts, "may_write", lambda _: False)
    read_only = ArtifactStore(tmp_path)
    found = [planning.stored_benchmark(read_only, work, this_hardware(threads)) for threads in (1, 2, 4)]
    assert [(item.cpu, item.threads) for item in found if item] == [(cpu_name(), 1), ("C", 2), ("B", 4)]


def test_a_read_only_cache_that_is_damaged_says_where(
    tmp_path: Path, base: TinyBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, work, _ = built(tmp_path, base)
    victim = store.folder(work.keys[1]) / WEIGHTS
    victim.write_bytes(b"half")
    monkeypatch.setattr(artifacts, "may_write", lambda _: False)
    assert f"{victim}: sha256 is" in (planning.shortfall(ArtifactStore(tmp_path), work, this_hardware(1)) or "")


FACTORIES = """
from pathlib import Path
import torch
from torch import nn

def made(name):
    linear = nn.Linear(3, 2)
    linear.load_state_dict(torch.load(Path(__file__).parent / name, weights_only=True))
    return linear

def one():
    return made("one.pt")

def other():
    return made("other.pt")
"""


def test_each_factory_and_each_training_is_answered_by_its_own_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", sys.path.copy())
    (tmp_path / "built_factories.py").write_text(FACTORIES)
    config = ServiceConfig.model_validate({"base": "digits", "variants": [{"name": "float"}]})

    def answer(factory: str) -> list[float]:
        """Of what the cache gives for this base, to a row of ones: the sum of a weight's row, and its bias."""
        declared = {"python": f"built_factories:{factory}", "inputs": {"x": {"shape": [3]}}}
        origin = {"base": declared, "data": {"synthetic": 8}, "folder": tmp_path, "cache": tmp_path / "cache"}
        base = open_base(Origin.model_validate(origin))
        store, work = ArtifactStore(tmp_path / "cache"), planning.plan(config, base, this_hardware())
        build.Builder(store, config, base, this_hardware(1), BuildProgress(Console(file=io.StringIO()), 1)).build(work)
        model = load_model(store, base, work.served[0])
        assert isinstance(model, TorchModel)
        found: list[float] = model.module(torch.ones(1, 3))[0].tolist()
        return found

    def train(name: str, weight: float) -> None:
        torch.save({"weight": torch.full((2, 3), weight), "bias": torch.tensor([0.0, 0.5])}, tmp_path / name)

    train("one.pt", 1.0)
    train("other.pt", 2.0)
    assert answer("one") == [3.0, 3.5]
    assert answer("other") == [6.0, 6.5]
    train("one.pt", 3.0)
    assert answer("one") == [9.0, 9.5]
    assert answer("other") == [6.0, 6.5]
