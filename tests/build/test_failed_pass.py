"""A pass that cannot be applied: its variant is excluded and says why, the others are built and served."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from leanserve.artifacts.benchmarks import BenchmarkResult, RatioInterval
from leanserve.artifacts.manifest import Recipe, VariantReport
from leanserve.artifacts.store import ArtifactStore
from leanserve.build import builder as build
from leanserve.build import plan as planning
from leanserve.build.progress import BuildProgress
from leanserve.config.schema import ServiceConfig
from leanserve.config.variant_section import GateConfig
from leanserve.contracts import Json
from leanserve.errors import GateFailed, PassFailed
from leanserve.evaluation.quality import GateOutputs
from leanserve.evaluation.speed import Stopwatch
from leanserve.hardware import cpu_name, this_hardware
from leanserve.passes.families.runtime.channels_last import ChannelsLast
from leanserve.report.page import render
from leanserve.report.summary import summarise
from leanserve.report.table import print_table
from measurements import measurement
from tiny_base import TinyBase, tiny_base

FOLD: Json = {"kind": "fold_bn"}
HOPELESS: Json = {"kind": "lowrank_linear", "macs": 0.001}
REASON = r"pass 1 \(lowrank_linear\) cannot be applied: macs: 0.001 cannot be reached"


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured, by key; measuring itself is done in other tests."""
    seen: list[str] = []

    def measure(_store: object, _base: object, recipe: Recipe, *_: object) -> object:
        seen.append(recipe.key)
        return measurement().model_copy(update={"cpu": cpu_name(), "threads": 1}), GateOutputs((), None)

    def beside_anchor(stopwatch: Stopwatch, anchor: str, keys: list[str]) -> list[BenchmarkResult]:
        same = {"latency_ms": {1: 2.0}, "anchor_ms": {1: 2.0}, "ratios": {1: RatioInterval(median=1, low=1, high=1)}}
        same |= {"rounds": 7, "waited": 0.0}
        machine = {"cpu": stopwatch.hardware.cpu, "threads": stopwatch.hardware.threads}
        return [BenchmarkResult.model_validate({"key": key, "anchor": anchor, **machine, **same}) for key in keys]

    monkeypatch.setattr(build, "measure", measure)
    monkeypatch.setattr(Stopwatch, "beside_anchor", beside_anchor)
    return seen


def config(gate: Json, *last: Json) -> ServiceConfig:
    variants = [{"name": "float"}, {"name": "thin", "passes": [HOPELESS, FOLD]}, *last]
    return ServiceConfig.model_validate({"base": "tiny", "gate": gate, "variants": variants})


def built(root: Path, settings: ServiceConfig) -> tuple[str, list[VariantReport]]:
    """What the progress said, and the reports."""
    base: TinyBase = tiny_base()
    store, work, said = ArtifactStore(root), planning.plan(settings, base, this_hardware()), io.StringIO()
    build.Builder(
        store, settings, base, this_hardware(1), BuildProgress(Console(file=said, width=400), len(work.keys))
    ).build(work)
    assert planning.shortfall(store, work, this_hardware(1)) is None
    return said.getvalue(), planning.reports(store, settings, work, this_hardware(1))


def test_it_excludes_its_variant_and_the_others_are_built(tmp_path: Path) -> None:
    said, reports = built(tmp_path, config({}, {"name": "folded", "passes": [FOLD]}))
    assert "variant 'thin', pass 1 (lowrank_linear) cannot be applied, the variant is excluded: macs: 0.001" in said
    assert [(item.name, item.state, item.built) for item in reports] == [
        ("float", "serving", True),
        ("thin", "excluded", False),
        ("folded", "serving", True),
    ]
    assert (reports[1].reason or "").startswith(
        "pass 1 (lowrank_linear) cannot be applied: macs: 0.001 cannot be reached"
    )


def test_a_pass_that_this_machine_cannot_apply_excludes_its_variant_until_another_machine_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config({}, {"name": "small", "passes": [FOLD, {"kind": "channels_last"}]})
    with monkeypatch.context() as patched:
        patched.setattr(ChannelsLast, "unsupported_reason", lambda *_: "this machine has no planes")
        said, reports = built(tmp_path, settings)
        assert "variant 'small', pass 2 (channels_last) cannot be applied here, the variant is excluded: this" in said
        assert (reports[2].state, reports[2].built) == ("excluded", False)
        assert reports[2].reason == "pass 2 (channels_last) cannot be applied: this machine has no planes"
        with pytest.raises(PassFailed, match=r"^variant 'small', pass 2 \(channels_last\): this machine has no planes"):
            built(tmp_path, settings.model_copy(update={"gate": GateConfig(on_fail="abort")}))
    assert [item.state for item in built(tmp_path, settings)[1]] == ["serving", "excluded", "serving"]


def test_where_only_the_base_remains_it_is_served(tmp_path: Path) -> None:
    assert [item.state for item in built(tmp_path, config({"on_fail": "exclude"}))[1]] == ["serving", "excluded"]


def test_a_start_from_the_cache_knows_it_without_trying_again(tmp_path: Path, measured: list[str]) -> None:
    first = built(tmp_path, config({}))[1]
    measured.clear()
    said, again = built(tmp_path, config({}))
    assert "lowrank_linear" not in said
    assert measured == []
    assert again == first


def test_a_damaged_note_is_no_note(tmp_path: Path) -> None:
    built(tmp_path, config({}))
    [note] = (tmp_path / "failures").iterdir()
    note.write_text("{}")
    assert "cannot be applied" in built(tmp_path, config({}))[0]


def test_abort_ends_the_build_and_a_start_from_the_cache(tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match=r"^variant 'thin', pass 1 \(lowrank_linear\): macs"):
        built(tmp_path, config({"on_fail": "abort"}))
    built(tmp_path, config({}))
    with pytest.raises(GateFailed, match=rf"variant 'thin': {REASON}.* set gate\.on_fail: exclude"):
        built(tmp_path, config({"on_fail": "abort"}))


def test_the_report_shows_it_without_numbers(tmp_path: Path) -> None:
    reports = built(tmp_path, config({}))[1]
    summary = summarise(reports)
    assert [variant.name for variant in summary.variants] == ["float"]
    assert [(item.number, item.name) for item in summary.unmade] == [(2, "thin")]
    page, text = render(summary, "title"), io.StringIO()
    assert "pass 1 (lowrank_linear) cannot be applied" in page
    print_table(reports, Console(file=text, width=300))
    assert "excluded: pass 1 (lowrank_linear) cannot be applied: macs: 0.001" in text.getvalue()
