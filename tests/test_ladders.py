"""`loadtest.benchmarks.ladders`: what is found out is kept line by line, and goes on where it ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanserve.artifacts.benchmarks import BenchmarkResult, RatioInterval
from leanserve.config.schema import ServiceConfig
from loadtest.benchmarks import families, ladders, precision
from loadtest.benchmarks.ladders import Bases, Results, table

BUILT = {"key": "k", "answers": 0.98, "worst": 0.9, "disk_bytes": 1_140_000, "memory_bytes": 19e6, "seconds": 7.4}


@pytest.mark.parametrize("bases", [precision.BASES, families.BASES], ids=["precision", "families"])
def test_every_variant_is_one_that_a_config_may_have(bases: Bases) -> None:
    for sections, variants in bases.values():
        assert ladders.ANCHOR in variants
        steps = [{"name": name, "passes": passes} for name, passes in variants.items()]
        ServiceConfig.model_validate({**sections, "variants": steps})


def test_lines_add_up_and_are_there_again(tmp_path: Path) -> None:
    results = Results(tmp_path)
    results.add("digits", "onnx-int8", BUILT)
    results.add("digits", "onnx-int8-dynamic", {"reason": "it has convolutions"})
    result = BenchmarkResult(
        key="k",
        anchor="a",
        cpu="c",
        threads=2,
        latency_ms={1: 0.5, 8: 2.0},
        anchor_ms={1: 1.0, 8: 8.0},
        ratios={1: RatioInterval(median=0.5, low=0.4, high=0.6), 8: RatioInterval(median=0.25, low=0.2, high=0.3)},
        rounds=7,
        waited=0.0,
    )
    results.add("digits", "onnx-int8", ladders._speed(result))
    found = Results(tmp_path).of("digits", ["onnx", "onnx-int8-dynamic", "onnx-int8"])
    assert list(found) == ["onnx-int8-dynamic", "onnx-int8"], "in the order of the table"
    _, _, refused, line = table(found)
    assert refused == "| onnx-int8-dynamic | it has convolutions |"
    assert line == "| onnx-int8 | 0.9800 |  |  | 1.1 | 0.50 | 4,000 | 2.00x / 4.00x | 19 | 7 |"


def test_nothing_is_timed_without_the_anchor(tmp_path: Path) -> None:
    bench = ladders.Bench("digits", None, Results(tmp_path), 0.0)  # type: ignore[arg-type] # it is not looked at
    with pytest.raises(SystemExit, match="build 'onnx' first"):
        next(bench.time(1.0))
