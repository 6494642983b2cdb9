"""Choosing the lanes: rates of one wide and of narrow lanes, what they decide, and that old measurements lack them."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner
from typer.testing import Result as CommandResult

from leanserve.__main__ import app
from leanserve.artifacts.benchmarks import LANE_GAIN, PAIR_GAIN, BenchmarkResult, BenchmarkSet, LaneRates
from leanserve.artifacts.store import ArtifactStore
from leanserve.build.plan import Plan, stored_benchmark
from leanserve.config.schema import ServiceConfig
from leanserve.contracts import Arrays, Result
from leanserve.errors import ConfigError
from leanserve.evaluation import lane_rates
from leanserve.hardware import cpu_name, this_hardware
from leanserve.runtime.formats.torch import use_threads

BATCHES = [(np.zeros((rows, 1), np.float32),) for rows in (1, 4)]


class Sleeper:
    """Takes `seconds(threads)` per batch of any size, and belongs to the thread that made it."""

    name = "sleeper"
    self_contained = False
    device = "cpu"
    row_buckets: tuple[int, ...] = ()

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.thread = threading.current_thread()
        self.closed = False

    def run(self, batch: Arrays) -> Result:
        assert threading.current_thread() is self.thread
        time.sleep(self.seconds)
        return Result(batch)

    def close(self) -> None:
        assert threading.current_thread() is self.thread
        self.closed = True


@pytest.mark.parametrize(("wide_s", "gain"), [(0.008, 2.0), (0.004, 1.0)], ids=["threads wait", "threads help"])
def test_each_lane_runs_its_own_instance_and_their_rates_add_up(wide_s: float, gain: float) -> None:
    opened: list[tuple[int, Sleeper]] = []

    def load(threads: int) -> Sleeper:
        opened.append((threads, Sleeper({2: wide_s, 1: 0.008}[threads])))
        return opened[-1][1]

    before = torch.get_num_threads()
    try:
        rates = lane_rates.lane_rates(load, BATCHES, threads=2, seconds=60.0)
    finally:
        use_threads(before)
    assert rates[2] / rates[1] == pytest.approx(gain, rel=0.2)
    assert rates[1] == pytest.approx(4 / wide_s, rel=0.2), "of the best batch size"
    assert sorted(threads for threads, _ in opened) == [1, 1, 2]
    assert len({sleeper.thread for _, sleeper in opened}) == 3
    assert all(sleeper.closed for _, sleeper in opened)


def test_torch_has_as_many_threads_as_its_lane_in_every_turn() -> None:
    seen: set[tuple[int, int]] = set()

    class Looking(Sleeper):
        def __init__(self, threads: int) -> None:
            super().__init__(0.001)
            self.threads = threads

        def run(self, batch: Arrays) -> Result:
            seen.add((self.threads, torch.get_num_threads()))
            return super().run(batch)

    before = torch.get_num_threads()
    try:
        lane_rates.lane_rates(Looking, BATCHES[:1], threads=2, seconds=60.0)
    finally:
        use_threads(before)
    assert seen == {(1, 1), (2, 2)}


def measured(rates: dict[str, float], threads: int = 2) -> BenchmarkSet:
    """Artifacts by name with the gain of narrow lanes."""
    lanes = {key: lanes_of(key, gain, threads) for key, gain in rates.items()}
    return BenchmarkSet(cpu_name(), threads, "base", {}, lanes)


def lanes_of(key: str, gain: float, threads: int) -> LaneRates:
    return LaneRates(key=key, cpu=cpu_name(), threads=threads, rates={1: 100.0, threads: 100.0 * gain})


@pytest.mark.parametrize(
    ("rates", "lanes"),
    [({"a": 1.3}, 2), ({"a": LANE_GAIN - 0.01}, 1), ({"a": 2.0, "b": 0.7}, 2), ({"a": 2.0, "b": 0.6}, 1)],
)
def test_narrow_lanes_must_pay_on_the_geometric_mean(rates: dict[str, float], lanes: int) -> None:
    assert measured(rates).best_lanes(list(rates), 2, self_contained=False) == lanes


@pytest.mark.parametrize(
    ("threads", "gain", "lanes"), [(2, PAIR_GAIN, 2), (2, PAIR_GAIN - 0.01, 1), (4, LANE_GAIN - 0.01, 1), (4, 1.2, 4)]
)
def test_less_is_enough_for_two_lanes_where_a_lone_batch_has_both_threads(
    threads: int, gain: float, lanes: int
) -> None:
    assert measured({"a": gain}, threads).best_lanes(["a"], threads, self_contained=True) == lanes


def test_only_the_variants_that_serve_have_a_say() -> None:
    assert measured({"a": 1.0, "excluded": 9.0}).best_lanes(["a"], 2, self_contained=False) == 1


@pytest.mark.parametrize(
    ("rates", "lanes"),
    [
        ({1: 100, 2: 105, 4: 109}, 1),
        ({1: 100, 2: 115, 4: 120}, 2),
        ({1: 100, 2: 115, 4: 130}, 4),
        ({1: 100, 2: 105, 4: 130}, 4),
        ({1: 100, 2: 130, 4: 0}, 2),
    ],
)
def test_a_gpu_gets_more_lanes_only_for_what_they_bring(rates: dict[int, float], lanes: int) -> None:
    found = LaneRates(key="a", cpu="a card", threads=2, rates=rates)
    timed = BenchmarkSet("a card", 2, "base", {}, {"a": found, "b": found.model_copy(update={"key": "b"})})
    assert timed.best_streams(["a", "b"]) == lanes
    assert timed.best_streams([]) == 1


def test_the_numbers_of_lanes_that_are_compared_can_be_given() -> None:
    found = lane_rates.lane_rates(lambda _: Sleeper(0.002), BATCHES[:1], 2, 0.0, (1, 3))
    assert found.keys() == {1, 3}
    assert found[3] > 1.2 * found[1]


def test_one_thread_is_one_lane_unmeasured() -> None:
    alone = BenchmarkSet("x", 1, "a", {}, {})
    assert (alone.lane_gain(["a"]), alone.best_lanes(["a"], 1, self_contained=True)) == (1.0, 1)


@pytest.mark.parametrize(
    ("threads", "rates", "found"),
    [(2, {"base": 1.0, "last": 1.2}, 1), (2, {"base": 1.0}, 0), (1, {}, 1)],
)
def test_a_measurement_without_the_lanes_of_a_served_variant_is_taken_again(
    tmp_path: Path, threads: int, rates: dict[str, float], found: int
) -> None:
    steps = tuple(SimpleNamespace(key=key) for key in ("base", "middle", "last"))
    plan = Plan(cast(Any, ((None, steps[:1]), (None, steps))))
    assert (plan.served, plan.anchor) == (("base", "last"), "base")
    store = ArtifactStore(tmp_path)
    assert stored_benchmark(store, plan, this_hardware(threads)) is None
    for key in plan.keys:
        timed = {"latency_ms": {1: 1.0}, "anchor_ms": {}, "ratios": {}, "rounds": 7, "waited": 0.0}
        machine = {"cpu": cpu_name(), "threads": threads}
        store.keep_benchmark(BenchmarkResult.model_validate({"key": key, "anchor": "base", **machine, **timed}))
    for key, gain in rates.items():
        store.keep_lane_rates(lanes_of(key, gain, threads))
    assert (stored_benchmark(store, plan, this_hardware(threads)) is not None) == found


def config(**changes: object) -> dict[str, object]:
    return {"base": "digits", "variants": [{"name": "a"}], **changes}


@pytest.mark.parametrize("lanes", [0, -1, "many", 1.5])
def test_lanes_are_auto_or_at_least_one(lanes: object) -> None:
    with pytest.raises(ValidationError, match="lanes"):
        ServiceConfig.model_validate(config(lanes=lanes))


def test_there_are_no_more_lanes_than_threads(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"

    def check(lanes: int) -> CommandResult:
        path.write_text(yaml.safe_dump(config(threads=2, lanes=lanes)))
        return CliRunner().invoke(app, ["check", "--config", str(path)])

    assert check(2).exit_code == 0
    refused = check(3).exception
    assert isinstance(refused, ConfigError)
    line = 1 + path.read_text().splitlines().index("lanes: 3")
    assert str(refused) == f"{path}:{line}: lanes is 3, but there are only 2 threads to share"
