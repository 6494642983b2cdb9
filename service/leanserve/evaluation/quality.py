"""Does a compressed model still answer right, and what does it cost? Score, fidelity to the base, and the gate.

Score needs labels and belongs to the base (accuracy, Spearman, R squared ...). Fidelity needs none: it compares every
output of the variant on the gate split with that of the uncompressed base, row by row.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from leanserve import child, memory
from leanserve.artifacts.benchmarks import BenchmarkResult, LaneRates, RatioInterval
from leanserve.artifacts.manifest import Fidelity, Measurement, OutputFidelity, Quality, Recipe
from leanserve.artifacts.store import ArtifactStore
from leanserve.config.schema import GateConfig
from leanserve.contracts import Array, Arrays, Base, Json
from leanserve.errors import PassFailed
from leanserve.evaluation.fidelity import fidelity
from leanserve.evaluation.interleaved_benchmark import GROUP
from leanserve.evaluation.measure import ROWS
from leanserve.hardware import Hardware

RESAMPLES = 1000


@dataclass(frozen=True)
class GateOutputs:
    """Outputs on the gate split, and its labels if there are any."""

    outputs: Arrays
    labels: Array | None


def measure(
    store: ArtifactStore, base: Base, recipe: Recipe, reference: GateOutputs | None, hardware: Hardware
) -> tuple[Measurement, GateOutputs]:
    """Measure a published artifact in a fresh process; compare its answers with `reference` (`None`: it is the base).

    Raises:
        PassFailed: the artifact cannot be loaded or run, not even on a single row.
    """
    path = store.root / "tmp" / f"{recipe.key}.{os.getpid()}.npz"
    known = _measured(str(store.root), recipe.key, base.origin, str(hardware.threads), answers=str(path))
    with np.load(path, allow_pickle=False) as stored:
        answers = GateOutputs(tuple(stored[name] for name in stored.files), labels_of(base))
    path.unlink()
    size = {"disk_bytes": _disk_bytes(store, recipe), "parameters": recipe.parameters, "macs": recipe.macs}
    right = scored(base, answers)
    near = fidelity(answers.outputs, (reference or answers).outputs, base.spec.outputs)
    worst = min(output.agreement for output in near)
    found = Fidelity.model_validate(known | size | right | {"outputs": near, "agreement": worst})
    return Measurement(fidelity=found, cpu=hardware.cpu, threads=hardware.threads), answers


def benchmark(
    store: ArtifactStore, base: Base, anchor: str, keys: Sequence[str], hardware: Hardware
) -> list[BenchmarkResult]:
    """Time published and measured artifacts beside the anchor, which may be one of them, in a fresh process.

    Where there is no memory for a few at a time beside the anchor, they come one by one.

    Raises:
        PassFailed: they cannot be loaded or run beside the anchor.
    """
    asked = [_sized(store, key) for key in dict.fromkeys((anchor, *keys))]
    arguments = (str(store.root), base.origin, str(hardware.threads))
    try:
        timed = _in_fresh_process("interleaved_benchmark", *arguments, str(GROUP), *asked)
    except _Ended as error:
        if not error.out_of_memory:
            raise
        timed = _one_by_one(arguments, asked)
    return [_result(key, anchor, timed[key], hardware) for key in keys]


def _one_by_one(arguments: Sequence[str], asked: Sequence[str]) -> Json:
    try:
        return _in_fresh_process("interleaved_benchmark", *arguments, "1", *asked)
    except _Ended as error:
        if not error.out_of_memory:
            raise
        remedy = "give the build more memory, or make the variants smaller"
        raise PassFailed(f"variants are timed beside the base, and memory ran out: {error.last}; {remedy}") from error


def _result(key: str, anchor: str, timed: Mapping[str, Json], hardware: Hardware) -> BenchmarkResult:
    """From what the child printed of an artifact, by rows."""
    by_rows = {int(rows): measured for rows, measured in timed.items()}
    beside = {rows: measured for rows, measured in by_rows.items() if "ratio" in measured}
    return BenchmarkResult(
        key=key,
        anchor=anchor,
        cpu=hardware.cpu,
        threads=hardware.threads,
        latency_ms={rows: measured["ms"] for rows, measured in by_rows.items()},
        anchor_ms={rows: measured["anchor_ms"] for rows, measured in beside.items()},
        ratios={rows: _interval(*measured["ratio"]) for rows, measured in beside.items()},
    )


def _interval(median: float, low: float, high: float) -> RatioInterval:
    return RatioInterval(median=median, low=low, high=high)


def benchmark_lanes(
    store: ArtifactStore, base: Base, timed: Sequence[BenchmarkResult], hardware: Hardware
) -> list[LaneRates]:
    """What a lane per thread brings artifacts that were timed already.

    Raises:
        PassFailed: one cannot be loaded or run.
    """
    asked = [_sized(store, result.key) for result in timed]
    try:
        rates = _in_fresh_process("lane_rates", str(store.root), base.origin, str(hardware.threads), *asked)
    except _Ended as error:
        if not error.out_of_memory:
            raise
        rates = {result.key: {1: result.throughput, hardware.threads: 0.0} for result in timed}
    machine = {"cpu": hardware.cpu, "threads": hardware.threads}
    return [LaneRates.model_validate({"key": item.key, **machine, "rates": rates[item.key]}) for item in timed]


def _sized(store: ArtifactStore, key: str) -> str:
    """As the children are told of an artifact."""
    return f"{key}:{_largest_batch(store.measurement(key))}"


def _largest_batch(measured: Measurement | None) -> int:
    return (measured and measured.fidelity.memory_rows) or ROWS


class _Ended(PassFailed):
    """A child that ended without a result: its exit status, and what it said last."""

    def __init__(self, status: int, said: str) -> None:
        self.status = status
        self.last = said.splitlines()[-1] if said else f"the process {child.how_it_ended(status)}"
        super().__init__(f"what was built does not run: {self.last}" + (f"\n{said}" if "\n" in said else ""))

    @property
    def out_of_memory(self) -> bool:
        """Whether it said so, or was killed, as the kernel does then."""
        return self.status in {memory.EXIT_STATUS, -signal.SIGKILL}


def _measured(*arguments: str, answers: str) -> Json:
    """Measure in a child; where that is killed, in another one with half of the rows."""
    rows = ROWS
    while True:
        try:
            return _in_fresh_process("measure", *arguments, str(rows), answers)
        except _Ended as error:
            if not error.out_of_memory:
                raise
            if rows == 1 or error.status == memory.EXIT_STATUS:
                remedy = "give the build more memory, or make the model smaller"
                text = f"there is no memory even for a single row: {error.last}; {remedy}"
                raise PassFailed(text, lasting=False) from error
        rows //= 2


def _in_fresh_process(module: str, *arguments: str) -> Json:
    command = child.command(f"leanserve.evaluation.{module}", *arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise _Ended(done.returncode, done.stderr.strip())
    return json.loads(done.stdout.strip().splitlines()[-1])


def labels_of(base: Base) -> Array | None:
    """Labels of the whole gate split."""
    parts = [batch.labels for batch in base.data("gate").batches(64)]  # images are decoded for it
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if known and len(known) == len(parts) else None


def scored(base: Base, answers: GateOutputs) -> dict[str, float | None]:
    """The base's score with its 95 % confidence interval: Wilson for an accuracy, bootstrap for anything else."""
    if answers.labels is None:
        return {"score": None, "score_low": None, "score_high": None}
    score = base.score(answers.outputs, answers.labels)
    if base.spec.labels:
        low, high = _wilson(score, len(answers.labels))
    else:
        low, high = _bootstrap(base, answers)
    return {"score": score, "score_low": low, "score_high": high}


def gate_reason(gate: GateConfig, quality: Quality, base: Quality) -> str | None:
    """Why a variant fails its gate, or `None`. A limit that cannot be checked for lack of labels is a reason."""
    reasons = []
    if gate.max_drop is not None:
        if quality.score is None or base.score is None:
            reasons.append("gate.max_drop needs labels in the gate split, and there are none")
        elif base.score - quality.score > gate.max_drop + 1e-9:
            reasons.append(
                f"score {quality.score:.4f} is {base.score - quality.score:.4f} below the base's {base.score:.4f}; "
                f"gate.max_drop allows {gate.max_drop}"
            )
    if gate.min_agreement is not None:
        far = [output for output in quality.outputs if output.agreement < gate.min_agreement - 1e-9]
        reasons += [f"{_distance(output)}; gate.min_agreement asks for {gate.min_agreement}" for output in far]
    if gate.max_batch_dependence is not None and quality.batch_dependence > gate.max_batch_dependence:
        reasons.append(
            f"an answer changes by {quality.batch_dependence:.3g} of the largest output with the rows that share its "
            f"batch; gate.max_batch_dependence allows {gate.max_batch_dependence} (base.rows: one gives every row a "
            "batch to itself)"
        )
    return "; ".join(reasons) or None


def _distance(output: OutputFidelity) -> str:
    """How far an output is from the base's, in words."""
    broken = f" ({output.not_finite} numbers are infinite or NaN and should not be)" if output.not_finite else ""
    agreement = f"output '{output.name}'{broken} has an agreement of {output.agreement:.4f}"
    if output.cosine is not None:
        return f"{agreement}, its mean cosine with the base's"
    if output.error is None:
        return f"{agreement}, the share of rows with the base's answer"
    return f"{agreement}: it is off by {100 * output.error:.1f} % of the base's spread (channel {output.channel})"


def _wilson(share: float, samples: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (Wilson 1927), sound even at shares of 0 and 1."""
    from scipy.stats import binomtest

    found = binomtest(round(share * samples), samples).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def _bootstrap(base: Base, answers: GateOutputs) -> tuple[float, float]:
    """Percentile bootstrap over rows (Efron 1979), seeded; rows that are scored together are drawn together.

    A draw without a score (NaN, as of labels that are all alike) has no say.
    """
    from scipy.stats import bootstrap

    labels = answers.labels
    assert labels is not None

    def score(units: Array) -> float:
        rows = (units[:, None] * base.unit + np.arange(base.unit)).ravel()
        return base.score(tuple(array[rows] for array in answers.outputs), labels[rows])

    units = np.arange(len(labels) // base.unit)
    if len(units) < 2:
        return score(units), score(units)
    drawn = bootstrap((units,), score, n_resamples=RESAMPLES, method="percentile", vectorized=False, rng=0)
    low, high = np.nanpercentile(drawn.bootstrap_distribution, [2.5, 97.5])
    return float(low), float(high)


def _disk_bytes(store: ArtifactStore, recipe: Recipe) -> int:
    """Of the model's files, and of those that load passes brought."""
    ancestry = store.ancestry(recipe.key)
    used = ancestry[ancestry.index(store.holder(recipe.key)) :]
    return sum((store.folder(item.key) / name).stat().st_size for item in used for name in item.files)
