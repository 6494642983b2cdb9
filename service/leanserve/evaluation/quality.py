"""Does a compressed model still answer right? Score and fidelity to the base, both with their intervals.

Score needs labels and belongs to the base (accuracy, Spearman, R squared ...). Fidelity needs none: it compares every
output of the variant on the gate split with that of the uncompressed base, row by row.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leanserve import memory
from leanserve.artifacts.manifest import Fidelity, Measurement, Recipe
from leanserve.artifacts.store import ArtifactStore
from leanserve.contracts import Array, Arrays, Base, Json
from leanserve.errors import PassFailed
from leanserve.evaluation.fidelity import fidelity
from leanserve.evaluation.fresh_process import ChildEnded, in_fresh_process
from leanserve.evaluation.intervals import paired_difference, resampled_score, sampled_share
from leanserve.evaluation.measure import ROWS, share_argument
from leanserve.experiments.interval import Interval
from leanserve.hardware import Hardware
from leanserve.scoring import ACCURACY


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
    known = _measured(str(store.root), recipe.key, base.origin, share_argument(hardware), answers=str(path))
    with np.load(path, allow_pickle=False) as stored:
        answers = GateOutputs(tuple(stored[name] for name in stored.files), labels_of(base))
    path.unlink()
    size = {"disk_bytes": _disk_bytes(store, recipe), "parameters": recipe.parameters, "macs": recipe.macs}
    right = scored(base, answers) | lost(base, answers, reference or answers)
    near = fidelity(answers.outputs, (reference or answers).outputs, base.spec.outputs)
    worst = min(output.agreement for output in near)
    found = Fidelity.model_validate(known | size | right | {"outputs": near, "agreement": worst})
    machine = {"cpu": hardware.machine, "threads": hardware.threads}
    return Measurement.model_validate({"fidelity": found, "score_digest": base.score_digest} | machine), answers


def _measured(*arguments: str, answers: str) -> Json:
    """Measure in a child; where that is killed, in another one with half of the rows."""
    rows = ROWS
    while True:
        try:
            return in_fresh_process("measure", *arguments, str(rows), answers)
        except ChildEnded as error:
            if not error.out_of_memory:
                raise
            if rows == 1 or error.status == memory.EXIT_STATUS:
                remedy = "give the build more memory, or make the model smaller"
                text = f"there is no memory even for a single row: {error.last}; {remedy}"
                raise PassFailed(text, lasting=False) from error
        rows //= 2


def labels_of(base: Base) -> Array | None:
    """Labels of the whole gate split."""
    parts = [batch.labels for batch in base.data("gate").batches(64)]  # images are decoded for it
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if known and len(known) == len(parts) else None


def scored(base: Base, answers: GateOutputs) -> dict[str, float | None]:
    """The base's score with its 95 % confidence interval: Wilson for an accuracy, bootstrap for anything else."""
    labels = answers.labels
    if labels is None:
        return {"score": None, "score_low": None, "score_high": None}
    score, units = base.score(answers.outputs, labels), _units(base, answers)
    if base.scored_as == ACCURACY:
        interval = sampled_share(round(score * len(labels)), len(labels))
    elif units < 2:
        interval = Interval(score, score)
    else:
        interval = resampled_score(lambda drawn: base.score(*_rows_of(base, answers, drawn)), units)
    return {"score": score, "score_low": interval.low, "score_high": interval.high}


def lost(base: Base, ours: GateOutputs, theirs: GateOutputs) -> dict[str, float | None]:
    """The score that `ours` lose against `theirs`, the base's, on the same rows, with its 95 % confidence interval.

    Of an accuracy it is that of paired proportions, of anything else a bootstrap that draws the same rows for both.
    """
    labels = ours.labels
    if labels is None:
        return {"drop": None, "drop_low": None, "drop_high": None}
    drop, units = base.score(theirs.outputs, labels) - base.score(ours.outputs, labels), _units(base, ours)
    if all(map(_alike, ours.outputs, theirs.outputs)):
        interval = Interval(drop, drop)
    elif base.scored_as == ACCURACY:
        interval = paired_difference(_hits(base, theirs.outputs, labels), _hits(base, ours.outputs, labels))
    elif units < 2:
        interval = Interval(-math.inf, math.inf)
    else:

        def of_drawn(drawn: Array) -> float:
            before, after = (base.score(*_rows_of(base, side, drawn)) for side in (theirs, ours))
            return before - after

        interval = resampled_score(of_drawn, units)
    return {"drop": drop, "drop_low": _told(interval.low), "drop_high": _told(interval.high)}


def _hits(base: Base, outputs: Arrays, labels: Array) -> NDArray[np.bool_]:
    return np.asarray(outputs[base.spec.labelled].argmax(axis=1) == labels)


def _units(base: Base, answers: GateOutputs) -> int:
    """How many there are that are scored together."""
    return len(answers.outputs[0]) // base.unit


def _rows_of(base: Base, answers: GateOutputs, units: Array) -> tuple[Arrays, Array]:
    """Outputs and labels of units, which keep their rows together."""
    assert answers.labels is not None
    rows = (units[:, None] * base.unit + np.arange(base.unit)).ravel()
    return tuple(array[rows] for array in answers.outputs), answers.labels[rows]


def _alike(one: Array, other: Array) -> bool:
    return bool(np.array_equal(one, other, equal_nan=one.dtype.kind == "f"))


def _told(end: float) -> float | None:
    """As JSON has it, which knows no infinity."""
    return end if math.isfinite(end) else None


def _disk_bytes(store: ArtifactStore, recipe: Recipe) -> int:
    """Of the model's files, and of those that load passes brought."""
    ancestry = store.ancestry(recipe.key)
    used = ancestry[ancestry.index(store.holder(recipe.key)) :]
    return sum((store.folder(item.key) / name).stat().st_size for item in used for name in item.files)
