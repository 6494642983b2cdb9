"""Building a model that has memory for few rows only: what is measured, timed and told, and what is refused."""

from __future__ import annotations

import copy
import io
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from leanserve import memory
from leanserve.artifacts.benchmarks import BenchmarkSet, RatioInterval
from leanserve.artifacts.store import ArtifactStore
from leanserve.contracts import ArrayData, Arrays, BuildContext, ModelSpec, Progress, Result
from leanserve.errors import PassFailed
from leanserve.evaluation import interleaved_benchmark, lane_rates, measure, quality, speed
from leanserve.evaluation.fresh_process import ChildEnded, nobody_told
from leanserve.evaluation.speed import Stopwatch
from leanserve.hardware import this_hardware
from leanserve.passes.families.lowrank.lowrank_linear import LowrankLinear
from leanserve.passes.families.prune.prune_channels import PruneChannels
from leanserve.passes.toolkit import calibration
from leanserve.passes.toolkit.training import train
from leanserve.passes.toolkit.training_options import TrainingOptions
from leanserve.passes.toolkit.training_run import Objective
from leanserve.report.table import print_table
from leanserve.runtime.formats.torch import use_threads
from report_samples import a_few, changed
from tiny_base import TinyBase, TinyNet, context_of, lively, tiny_base

OUT = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
SPEC = ModelSpec((), ())


class Small:
    """Has memory for so many rows."""

    name = "small"
    self_contained = False
    device = "cpu"
    row_buckets: tuple[int, ...] = ()

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.ran: list[int] = []

    def run(self, batch: Arrays) -> Result:
        self.ran.append(len(batch[0]))
        if len(batch[0]) > self.limit:
            raise RuntimeError(OUT)
        return Result((batch[0] * 2,))

    def close(self) -> None: ...


def batches(*rows: int) -> list[Arrays]:
    return [(np.ones((count, 1), np.float32),) for count in rows]


def test_sizes_that_are_timed_end_with_what_fits() -> None:
    assert interleaved_benchmark.sizes_up_to([32], 1.0) == [1, 8, 32]
    assert interleaved_benchmark.sizes_up_to([4], 1.0) == [1, 4]
    assert interleaved_benchmark.sizes_up_to([32, 16, 1], 1.0) == [1, 8, 16, 32]
    assert interleaved_benchmark.sizes_up_to([32, 4], 0.0) == [1]


def test_only_what_fits_is_timed_and_what_does_not_beside_others_is_left_out() -> None:
    backends = {"measured": Small(8), "crowded": Small(8), "large": Small(32)}
    limits = {"measured": 8, "crowded": 32, "large": 32}
    *_, last = islice(
        interleaved_benchmark.interleaved(backends, dict.fromkeys(backends, batches(1, 8, 32)), 0.0, limits), 3
    )
    assert {name: list(by_rows) for name, by_rows in last.items()} == {
        "measured": [1, 8],
        "crowded": [1, 8],
        "large": [1, 8, 32],
    }
    assert all(len(seconds) == 3 for by_rows in last.values() for seconds in by_rows.values())
    assert 32 not in backends["measured"].ran
    assert backends["crowded"].ran.count(32) == 1
    with pytest.raises(RuntimeError, match="can't allocate"):
        next(interleaved_benchmark.interleaved({"none": Small(0)}, {"none": batches(1)}, 0.0, {"none": 32}))


@pytest.mark.parametrize(("limits", "rates"), [((8, 1), "narrow is slower"), ((8, None), "there is no narrow one")])
def test_lanes_are_compared_by_the_batches_that_fit_on_each(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int | None], rates: str
) -> None:
    monkeypatch.setattr(lane_rates, "TURN_S", 0.001)
    wide, narrow = limits

    def load(threads: int) -> Small:
        if threads == 1 and narrow is None:
            raise MemoryError
        return Small(wide if threads == 2 else narrow or 0)

    before = torch.get_num_threads()
    try:
        found = lane_rates.lane_rates(load, batches(1, 8, 32), 2, 60.0)
    finally:
        use_threads(before)
    assert found[1] > found[2]
    assert (found[2] == 0) == (narrow is None)


def test_rows_are_measured_as_far_as_they_go() -> None:
    backend, data = Small(3), ArrayData((np.arange(20, dtype=np.float32).reshape(20, 1),))
    (outputs,) = measure.outputs_on(backend, data)
    assert np.array_equal(outputs, 2 * data.inputs[0])
    assert max(rows for rows in backend.ran if rows <= 3) == 2


MEDIANS = {"1": {"ms": 2.0, "anchor_ms": 4.0, "ratio": [0.5, 0.4, 0.6]}, "8": {"ms": 10.0}}
ANSWERS: dict[str, Any] = {
    "measure": {},
    "interleaved_benchmark": {key: {"by_rows": MEDIANS, "rounds": 7, "waited": 0.1} for key in "ab"},
    "lane_rates": {"a": {"1": 800.0, "2": 900.0}},
}
KILLED = ChildEnded(-signal.SIGKILL, "")


def children(monkeypatch: pytest.MonkeyPatch, ends: dict[str, ChildEnded], fitting: int = 32) -> list[tuple[str, ...]]:
    """Children that end like this, or are killed where they measure more rows than fit; what was asked of them."""
    asked: list[tuple[str, ...]] = []

    def run(module: str, *arguments: str, progress: Progress = nobody_told) -> Any:
        asked.append((module, *arguments))
        if module in ends:
            raise ends[module]
        if module == "measure" and int(arguments[-2]) > fitting:
            raise KILLED
        return ANSWERS[module]

    monkeypatch.setattr(quality, "in_fresh_process", run)
    monkeypatch.setattr(speed, "in_fresh_process", run)
    return asked


def test_where_the_kernel_kills_a_measurement_half_of_the_rows_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = children(monkeypatch, {}, fitting=10)
    quality._measured("cache", answers="answers.npz")
    assert [arguments[-2:] for arguments in asked] == [(rows, "answers.npz") for rows in ("32", "16", "8")]


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (KILLED, "the process was killed (SIGKILL), as the kernel does when memory runs out"),
        (ChildEnded(memory.EXIT_STATUS, OUT), OUT),
    ],
)
def test_a_model_for_which_a_single_row_is_too_much_is_refused(
    monkeypatch: pytest.MonkeyPatch, end: ChildEnded, text: str
) -> None:
    children(monkeypatch, {"measure": end})
    with pytest.raises(PassFailed) as refused:
        quality._measured("cache", answers="answers.npz")
    assert str(refused.value).startswith(f"there is no memory even for a single row: {text}; give the build more")


def test_another_failure_of_a_measurement_keeps_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    children(monkeypatch, {"measure": ChildEnded(1, "Traceback\nValueError: no")})
    with pytest.raises(PassFailed, match="what was built does not run: ValueError: no\nTraceback"):
        quality._measured("cache", answers="answers.npz")
    assert str(ChildEnded(-signal.SIGSEGV, "")) == "what was built does not run: the process was ended by SIGSEGV"


def test_what_cannot_be_timed_beside_the_base_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = children(monkeypatch, {"interleaved_benchmark": KILLED})
    with pytest.raises(PassFailed, match=r"beside the base, and memory ran out: .* killed .*; give .* smaller"):
        Stopwatch(ArtifactStore(tmp_path), tiny_base(), this_hardware(2), 9.0).beside_anchor("a", ["b"])
    assert {arguments[4] for arguments in asked} == {"9.0"}
    assert [arguments[5:] for arguments in asked] == [("3", "a:32", "b:32"), ("1", "a:32", "b:32")]


def test_of_what_was_timed_the_ratios_are_kept_where_the_base_has_memory_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    children(monkeypatch, {})
    [found] = Stopwatch(ArtifactStore(tmp_path), tiny_base(), this_hardware(2)).beside_anchor("a", ["b"])
    assert (found.rounds, found.waited) == (7, 0.1)
    assert (found.key, found.anchor, found.threads) == ("b", "a", 2)
    assert (found.latency_ms, found.anchor_ms) == ({1: 2.0, 8: 10.0}, {1: 4.0})
    assert found.ratios == {1: RatioInterval(median=0.5, low=0.4, high=0.6)}


def test_where_lanes_have_no_memory_beside_each_other_one_is_enough(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stopwatch = Stopwatch(ArtifactStore(tmp_path), tiny_base(), this_hardware(2))
    children(monkeypatch, {})
    timed = stopwatch.beside_anchor("a", ["a"])
    [known] = stopwatch.lanes(timed)
    assert (known.rates, known.gain) == ({1: 800.0, 2: 900.0}, 1.125)
    children(monkeypatch, {"lane_rates": KILLED})
    [found] = stopwatch.lanes(timed)
    assert found.rates == {1: 800.0, 2: 0.0}
    benchmark = BenchmarkSet("x", 2, "a", {}, {"a": found})
    assert benchmark.best_lanes(["a"], 2, self_contained=True) == 1


class SmallNet(TinyNet):
    """Has memory for eight rows, and for four while it trains."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if len(image) > (4 if torch.is_grad_enabled() else 8):
            raise RuntimeError(OUT)
        return super().forward(image)


def small_base() -> TinyBase:
    whole = tiny_base()
    return TinyBase(lively(SmallNet(), seed=1), whole.inputs, whole.labels)


@pytest.mark.parametrize(
    "step",
    [LowrankLinear(rank=1), PruneChannels(macs=0.6, importance="taylor", round_to=1)],
    ids=lambda step: str(step.kind),
)
def test_passes_run_as_many_rows_at_a_time_as_fit(tmp_path: Path, step: LowrankLinear | PruneChannels) -> None:
    found, expected = (step.apply(base.model(), context_of(base, tmp_path)) for base in (small_base(), tiny_base()))
    assert found.decisions == expected.decisions


def test_calibration_runs_as_many_rows_at_a_time_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def run(self, names: list[str], given: dict[str, Any]) -> list[Any]:
            if len(given["image"]) > 8:
                raise RuntimeError(OUT)
            return [given["image"] * 2]

    monkeypatch.setattr(calibration, "open_session", lambda *_: Session())
    monkeypatch.setattr(calibration, "_exposing", lambda model, _: model)
    base = tiny_base()
    model = type("Model", (), {"graph": type("Graph", (), {"input": ()})})
    data = base.data("calibration")
    recording = calibration.Recording(model, base.spec, ["y"], data, 32, 1)  # type: ignore[arg-type]
    played = list(recording.play())
    assert [rows for rows, _ in played] == [8] * 8 + [3]
    assert np.array_equal(np.concatenate([seen["y"] for _, seen in played]), 2 * data.inputs[0])


def test_training_without_memory_names_its_option(tmp_path: Path) -> None:
    base = small_base()
    student = copy.deepcopy(base.teacher)

    class Labels(Objective):
        def loss(self, inputs: tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> torch.Tensor:
            assert labels is not None
            return nn.functional.cross_entropy(student(*inputs), labels)

    context: BuildContext = context_of(base, tmp_path)
    data = base.data("train")
    with pytest.raises(PassFailed, match=r"batches of 16 rows \(.*can't allocate.*\); lower the option 'batch'"):
        train(student, Labels(), data, TrainingOptions(epochs=1, batch=16, precision="float32"), (), context)
    train(student, Labels(), data, TrainingOptions(epochs=1, batch=4, precision="float32"), (), context)


def test_the_report_tells_what_fits_only_where_that_bounds_a_variant() -> None:
    def printed(reports: list[Any]) -> str:
        console = Console(file=io.StringIO(), width=200)
        print_table(reports, console)
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    assert "rows that fit" not in printed(a_few())
    small = changed(a_few()[:1], {"memory_rows": 8, "latency_ms": {1: 10.0, 8: 80.0}})
    text = printed([*small, *a_few()[1:]])
    assert "rows that fit" in text
    row = next(line for line in text.split("Cost: size")[1].splitlines() if "eager" in line)
    assert row.split()[-3:] == ["8", "2.5", "s"]
