"""How fast artifacts are: timed in fresh processes, beside the base and with several lanes, within a bounded time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from leanserve.artifacts.benchmarks import BenchmarkResult, LaneRates, RatioInterval
from leanserve.artifacts.manifest import Measurement
from leanserve.artifacts.store import ArtifactStore
from leanserve.contracts import Base, Json, Progress
from leanserve.errors import PassFailed
from leanserve.evaluation.fresh_process import ChildEnded, in_fresh_process, nobody_told
from leanserve.evaluation.interleaved_benchmark import GROUP
from leanserve.evaluation.measure import ROWS, share_argument
from leanserve.hardware import Hardware
from leanserve.timing import MEASURE_S


class Stopwatch(NamedTuple):
    """With what and for how long artifacts of a store are timed, and who is told how far that is."""

    store: ArtifactStore
    base: Base
    hardware: Hardware
    seconds: float = MEASURE_S
    progress: Progress = nobody_told

    def beside_anchor(self, anchor: str, keys: Sequence[str]) -> list[BenchmarkResult]:
        """Time published and measured artifacts beside the anchor, which may be one of them.

        Where there is no memory for a few at a time beside the anchor, they come one by one.

        Raises:
            PassFailed: they cannot be loaded or run beside the anchor.
        """
        asked = [self._sized(key) for key in dict.fromkeys((anchor, *keys))]
        try:
            timed = self._timed(GROUP, asked)
        except ChildEnded as error:
            if not error.out_of_memory:
                raise
            timed = self._one_by_one(asked)
        return [_result(key, anchor, timed[key], self.hardware) for key in keys]

    def lanes(self, timed: Sequence[BenchmarkResult]) -> list[LaneRates]:
        """What a lane per thread brings artifacts that were timed already.

        Raises:
            PassFailed: one cannot be loaded or run.
        """
        asked, threads = [self._sized(result.key) for result in timed], self.hardware.threads
        try:
            rates = in_fresh_process("lane_rates", *self._arguments, *asked, progress=self.progress)
        except ChildEnded as error:
            if not error.out_of_memory:
                raise
            rates = {result.key: {1: result.throughput, threads: 0.0} for result in timed}
        machine = {"cpu": self.hardware.machine, "threads": threads}
        return [LaneRates.model_validate({"key": item.key, **machine, "rates": rates[item.key]}) for item in timed]

    @property
    def _arguments(self) -> tuple[str, ...]:
        return str(self.store.root), self.base.origin, share_argument(self.hardware), str(self.seconds)

    def _timed(self, group: int, asked: Sequence[str]) -> Json:
        return in_fresh_process("interleaved_benchmark", *self._arguments, str(group), *asked, progress=self.progress)

    def _one_by_one(self, asked: Sequence[str]) -> Json:
        try:
            return self._timed(1, asked)
        except ChildEnded as error:
            if not error.out_of_memory:
                raise
            remedy = "give the build more memory, or make the variants smaller"
            text = f"variants are timed beside the base, and memory ran out: {error.last}; {remedy}"
            raise PassFailed(text) from error

    def _sized(self, key: str) -> str:
        """As the children are told of an artifact."""
        return f"{key}:{_largest_batch(self.store.measurement(key))}"


def _result(key: str, anchor: str, timed: Mapping[str, Json], hardware: Hardware) -> BenchmarkResult:
    """From what the child printed of an artifact (`interleaved_benchmark.TimedArtifact`)."""
    by_rows = {int(rows): measured for rows, measured in timed["by_rows"].items()}
    beside = {rows: measured for rows, measured in by_rows.items() if "ratio" in measured}
    return BenchmarkResult(
        key=key,
        anchor=anchor,
        cpu=hardware.machine,
        threads=hardware.threads,
        latency_ms={rows: measured["ms"] for rows, measured in by_rows.items()},
        anchor_ms={rows: measured["anchor_ms"] for rows, measured in beside.items()},
        ratios={rows: _interval(*measured["ratio"]) for rows, measured in beside.items()},
        rounds=timed["rounds"],
        waited=timed["waited"],
    )


def _interval(median: float, low: float, high: float) -> RatioInterval:
    return RatioInterval(median=median, low=low, high=high)


def _largest_batch(measured: Measurement | None) -> int:
    return (measured and measured.fidelity.memory_rows) or ROWS
