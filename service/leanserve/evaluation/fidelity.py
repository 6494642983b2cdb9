"""How near the answers of an artifact are to those of its base: output by output, each by what it means.

A cosine of 1 says nothing about a regressor, an agreement of classes nothing about coordinates, and a right first
output nothing about the second. So there is one function per meaning, in one table (`MEASURES`): another meaning is
another function. Each gives an agreement from 0 to 1, which the gate judges, and the numbers behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np

from leanserve.artifacts.manifest import OutputFidelity
from leanserve.comparison import (
    ClassRows,
    both_finite,
    class_divergence,
    compared,
    differ_in_kind,
    row_cosines,
    same_classes,
)
from leanserve.contracts import CLASSES, Array, Arrays, Meaning, TensorSpec
from leanserve.passes.toolkit.spread import by_channel, channel_axis, channel_scales
from leanserve.scoring import spearman

RANKED_ROWS = 256
"""Rows of which all pairs are compared: 32,640 of them."""
PIECE = 2**22
"""Numbers of values that are compared at a time, in double precision: an output may be as large as an image."""
WHOLE = "biu"
"""Kinds of numpy dtypes that are compared by equality."""

Measures = dict[str, float | int | None]
MeasureOf = Callable[[Array, Array, TensorSpec], Measures]


def fidelity(outputs: Arrays, reference: Arrays, fields: Sequence[TensorSpec]) -> tuple[OutputFidelity, ...]:
    """How near each output [rows, ...] is to that of the base, for the same rows."""
    return tuple(_compared(*each) for each in zip(fields, outputs, reference, strict=True))


def _compared(field: TensorSpec, ours: Array, theirs: Array) -> OutputFidelity:
    measure = _equal if theirs.dtype.kind in WHOLE else MEASURES[field.meaning]
    broken = sum(int(differ_in_kind(ours[rows], theirs[rows]).sum()) for rows in _pieces(theirs))
    found = {"name": field.name, "meaning": field.meaning, "not_finite": broken} | measure(ours, theirs, field)
    return OutputFidelity.model_validate(found)


def _pieces(array: Array) -> list[slice]:
    """Rows that are compared at a time."""
    rows = max(1, PIECE // max(1, math.prod(array.shape[1:])))
    return [slice(start, start + rows) for start in range(0, len(array), rows)]


def _classes(ours: Array, theirs: Array, field: TensorSpec) -> Measures:
    """Share of rows [rows, classes] with the same answer, and mean divergence from the base's probabilities."""
    rows = ClassRows.of(ours, theirs)
    divergence = class_divergence(rows, field.meaning)
    agreement = float(same_classes(rows, ours, theirs, field.meaning).mean())
    return {"agreement": agreement, "kl": max(0.0, float(divergence.mean())) if len(divergence) else 0.0}


def _embedding(ours: Array, theirs: Array, _: TensorSpec) -> Measures:
    """Mean cosine of the rows, and how far the order of their similarities is kept."""
    ours, theirs = (np.asarray(array, np.float64).reshape(len(array), -1) for array in (ours, theirs))
    cosine, both = float(row_cosines(ours, theirs).mean()), compared(ours, theirs)
    return {"agreement": _share(cosine), "cosine": cosine, "rank_agreement": rank_agreement(both.one, both.other)}


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


def _pair_cosines(rows: Array) -> Array:
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return np.asarray((unit @ unit.T)[np.triu_indices(len(rows), k=1)])


def _values(ours: Array, theirs: Array, field: TensorSpec) -> Measures:
    """Root mean square error of the worst channel, relative to its scale in the base (`tools.spread`).

    A channel with a number that is not finite on one side only is wrong altogether: its error is at least 1.
    """
    axis, pieces = channel_axis(field.shape), _pieces(theirs)
    scales = channel_scales([theirs[rows] for rows in pieces], axis)
    count, squares, broken = (np.zeros(len(scales)) for _ in range(3))
    for rows in pieces:
        one, other = (by_channel(np.asarray(array[rows], np.float64), axis) for array in (ours, theirs))
        finite = both_finite(one, other)
        count += finite.sum(axis=1)
        squares += np.square(np.where(finite, one, 0.0) - np.where(finite, other, 0.0)).sum(axis=1)
        broken += differ_in_kind(one, other).sum(axis=1)
    errors = np.sqrt(squares / np.maximum(count, 1)) / scales
    return _worst(np.where(broken > 0, np.maximum(errors, 1.0), errors))


def _equal(ours: Array, theirs: Array, field: TensorSpec) -> Measures:
    """Share of whole numbers that are not those of the base, in the worst channel: no index is nearly right."""
    return _worst(by_channel(ours != theirs, channel_axis(field.shape)).mean(axis=1))


def _worst(errors: Array) -> Measures:
    worst = int(errors.argmax())
    return {"agreement": _share(1.0 - errors[worst]), "error": float(errors[worst]), "channel": worst}


def _share(value: float) -> float:
    return min(1.0, max(0.0, float(value)))


MEASURES: Final[Mapping[Meaning, MeasureOf]] = {
    **dict.fromkeys(CLASSES, _classes),
    "embedding": _embedding,
    "values": _values,
}
"""By what an output means. Whole numbers are compared as such, whatever they mean."""
