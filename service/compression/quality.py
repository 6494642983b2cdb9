"""Does a compressed model still answer right, and what does it cost? Score, fidelity to the base, and the gate.

Score needs labels and belongs to the base (accuracy, Spearman ...). Fidelity needs none: it compares the variant's
answers on the gate split with those of the uncompressed base, row by row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from service.bases.scores import spearman
from service.compression.artifacts import ArtifactStore
from service.compression.manifest import Fidelity, Measurement, Quality, Recipe, SideBySide
from service.config import GateConfig
from service.contracts import Array, Arrays, Base, Json
from service.errors import PassFailed
from service.machine import cpu_name

RESAMPLES = 1000
RANKED_ROWS = 256
"""Rows of which all pairs are compared: 32,640 of them."""


@dataclass(frozen=True)
class Answers:
    """Outputs on the gate split, and its labels if there are any."""

    outputs: Arrays
    labels: Array | None


def measure(
    store: ArtifactStore, base: Base, recipe: Recipe, reference: Answers | None, threads: int
) -> tuple[Measurement, Answers]:
    """Measure a published artifact in a fresh process; compare its answers with `reference` (`None`: it is the base).

    Raises:
        PassFailed: the artifact cannot be loaded or run.
    """
    path = store.root / "tmp" / f"{recipe.key}.{os.getpid()}.npz"
    known = _in_fresh_process("measure", str(store.root), recipe.key, base.origin, str(threads), str(path))
    with np.load(path, allow_pickle=False) as stored:
        answers = Answers(tuple(stored[name] for name in stored.files), labels_of(base))
    path.unlink()
    size = {"disk_bytes": _disk_bytes(store, recipe), "parameters": recipe.parameters, "macs": recipe.macs}
    right = scored(base, answers)
    near = fidelity(answers.outputs, (reference or answers).outputs, classes=bool(base.spec.labels))
    found = Fidelity.model_validate(known | size | right | near)
    return Measurement(fidelity=found, cpu=cpu_name(), threads=threads), answers


def race(store: ArtifactStore, base: Base, keys: Sequence[str], served: Sequence[str], threads: int) -> SideBySide:
    """Time published artifacts side by side in a fresh process; those that are `served` also with a lane per thread.

    Raises:
        PassFailed: they cannot be loaded or run together.
    """
    latencies = _in_fresh_process("race", str(store.root), base.origin, str(threads), *keys)
    rates = _in_fresh_process("lane_rates", str(store.root), base.origin, str(threads), *served) if threads > 1 else {}
    return SideBySide(cpu=cpu_name(), threads=threads, latency_ms=latencies, lane_rates=rates)


def _in_fresh_process(module: str, *arguments: str) -> Json:
    command = [sys.executable, "-m", f"service.compression.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise PassFailed(f"what was built does not run: {reason[0]}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def labels_of(base: Base) -> Array | None:
    """Labels of the whole gate split."""
    parts = [batch.labels for batch in base.data("gate").batches(64)]  # pictures are decoded for it
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if known and len(known) == len(parts) else None


def scored(base: Base, answers: Answers) -> dict[str, float | None]:
    """The base's score with its 95 % confidence interval: Wilson for an accuracy, bootstrap for anything else."""
    if answers.labels is None:
        return {"score": None, "score_low": None, "score_high": None}
    score = base.score(answers.outputs, answers.labels)
    if base.spec.labels:
        low, high = wilson(score, len(answers.labels))
    else:
        low, high = _bootstrap(base, answers)
    return {"score": score, "score_low": low, "score_high": high}


def wilson(share: float, samples: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (Wilson 1927), sound even at shares of 0 and 1."""
    centre = share + z * z / (2 * samples)
    spread = z * np.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    scale = 1 + z * z / samples
    return max(0.0, float((centre - spread) / scale)), min(1.0, float((centre + spread) / scale))


def fidelity(outputs: Arrays, reference: Arrays, *, classes: bool) -> dict[str, float | None]:
    """How near the answers are to the base's: top-1 agreement and mean KL (nats) for classes, order of the
    similarities for anything else, mean cosine for all.
    """
    ours, theirs = (np.asarray(arrays[0], np.float64).reshape(len(arrays[0]), -1) for arrays in (outputs, reference))
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosine = float(np.mean(np.sum(ours * theirs, axis=1) / np.maximum(norms, 1e-12)))
    if not classes:
        return {"agreement": None, "kl": None, "cosine": cosine, "rank_agreement": rank_agreement(ours, theirs)}
    ours_log, theirs_log = _log_softmax(ours), _log_softmax(theirs)
    kl = float(np.mean(np.sum(np.exp(theirs_log) * (theirs_log - ours_log), axis=1)))
    agreement = float(np.mean(ours.argmax(1) == theirs.argmax(1)))
    return {"agreement": agreement, "kl": max(0.0, kl), "cosine": cosine, "rank_agreement": None}


def rank_agreement(ours: Array, theirs: Array) -> float | None:
    """Spearman's correlation, -1..1, between the cosines of all pairs of rows [rows, D] and those of the other's rows.

    Search and clustering use embeddings by the order of their similarities alone, which a mean cosine near 1 does not
    promise to keep. `None` with fewer than three rows, which have no order.
    """
    ours, theirs = ours[:RANKED_ROWS], theirs[:RANKED_ROWS]
    if len(ours) < 3:
        return None
    if np.array_equal(ours, theirs):
        return 1.0  # also where all rows are alike, for which no correlation is defined
    return min(1.0, spearman(_pair_cosines(ours), _pair_cosines(theirs)))


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
        name, value = ("cosine", quality.cosine) if quality.agreement is None else ("agreement", quality.agreement)
        if value < gate.min_agreement - 1e-9:
            reasons.append(f"{name} with the base is {value:.4f}; gate.min_agreement asks for {gate.min_agreement}")
    if gate.max_batch_dependence is not None and quality.batch_dependence > gate.max_batch_dependence:
        reasons.append(
            f"an answer changes by {quality.batch_dependence:.3g} of the largest output with the rows that share its "
            f"batch; gate.max_batch_dependence allows {gate.max_batch_dependence} (base.rows: one gives every row a "
            "batch to itself)"
        )
    return "; ".join(reasons) or None


def _bootstrap(base: Base, answers: Answers) -> tuple[float, float]:
    """Percentile bootstrap over rows (Efron 1979), seeded."""
    assert answers.labels is not None
    random = np.random.default_rng(0)
    units = len(answers.labels) // base.unit
    drawn = random.integers(0, units, (RESAMPLES, units))
    # Rows that are scored together are drawn together.
    rows = (drawn[:, :, None] * base.unit + np.arange(base.unit)).reshape(RESAMPLES, -1)
    scores = [base.score(tuple(array[row] for array in answers.outputs), answers.labels[row]) for row in rows]
    low, high = np.nanpercentile(scores, [2.5, 97.5])
    return float(low), float(high)


def _pair_cosines(rows: Array) -> Array:
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return np.asarray((unit @ unit.T)[np.triu_indices(len(rows), k=1)])


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _disk_bytes(store: ArtifactStore, recipe: Recipe) -> int:
    holder = next(item for item in reversed(store.chain(recipe.key)) if item.files)
    folder: Path = store.folder(holder.key)
    return sum((folder / name).stat().st_size for name in holder.files)
