"""How near the answers of an artifact are to those of its base: output by output, each by what it means.

A cosine of 1 says nothing about a regressor, an agreement of classes nothing about coordinates, and a right first
output nothing about the second. So there is one function per meaning, in one table (`MEASURES`): another meaning is
another function. Each gives an agreement from 0 to 1, which the gate judges with its interval, the worst row, and the
numbers behind them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np

from leanserve.artifacts.manifest import OutputFidelity
from leanserve.comparison import (
    CLASS_LOGARITHMS,
    ClassRows,
    both_finite,
    class_divergence,
    compared,
    differ_in_kind,
    row_cosines,
    same_classes,
)
from leanserve.contracts import CLASS_MAPS, CLASSES, Array, Arrays, Meaning, TensorSpec
from leanserve.evaluation.class_maps import PlaceCounts, ratios
from leanserve.evaluation.intervals import resampled_means, sampled_share
from leanserve.experiments.interval import Interval
from leanserve.passes.toolkit.spread import by_channel, channel_axis, channel_scales
from leanserve.scoring import spearman
from leanserve.texts import as_numbers, of_fixed_width

RANKED_ROWS = 256
"""Rows of which all pairs are compared: 32,640 of them."""
PIECE = 2**22
"""Numbers of values that are compared at a time, in double precision: an output may be as large as an image."""
WHOLE = "biu"
"""Kinds of numpy dtypes that are compared by equality, as texts are."""
DRAWN_CHANNELS = 32
"""The worst channels (or classes), of which the interval of the worst is drawn: no other is the worst by chance."""

Measures = dict[str, float | int | None]
MeasureOf = Callable[[Array, Array, TensorSpec], Measures]


def fidelity(outputs: Arrays, reference: Arrays, fields: Sequence[TensorSpec]) -> tuple[OutputFidelity, ...]:
    """How near each output [rows, ...] is to that of the base, for the same rows."""
    return tuple(_compared(*each) for each in zip(fields, outputs, reference, strict=True))


def _compared(field: TensorSpec, given: Array, wanted: Array) -> OutputFidelity:
    ours, theirs = as_numbers(given, wanted)
    measure = _equal if theirs.dtype.kind in WHOLE else MEASURES[field.meaning]
    broken = sum(int(differ_in_kind(ours[rows], theirs[rows]).sum()) for rows in _pieces(theirs))
    found = {"name": field.name, "meaning": field.meaning, "not_finite": broken} | measure(ours, theirs, field)
    if all(_alike(ours[rows], theirs[rows]) for rows in _pieces(theirs)):
        found |= _between(Interval(1.0, 1.0))  # the same function, whatever the rows
    constant = _is_constant(of_fixed_width(given)) and not _is_constant(of_fixed_width(wanted))
    return OutputFidelity.model_validate(found | {"constant": constant})


def _alike(one: Array, other: Array) -> bool:
    return bool(np.array_equal(one, other, equal_nan=one.dtype.kind == "f"))


def _is_constant(output: Array) -> bool:
    """Whether all rows, of which there are at least two, are the same."""
    return len(output) > 1 and all(_alike(row, output[0]) for row in output[1:])


def _pieces(array: Array) -> list[slice]:
    """Rows that are compared at a time."""
    rows = max(1, PIECE // max(1, math.prod(array.shape[1:])))
    return [slice(start, start + rows) for start in range(0, len(array), rows)]


def _classes(ours: Array, theirs: Array, field: TensorSpec) -> Measures:
    """Share of rows [rows, classes] with the same answer, and mean divergence from the base's probabilities."""
    rows = ClassRows.of(ours, theirs)
    divergence = class_divergence(rows, field.meaning)
    same = same_classes(rows, ours, theirs, field.meaning)
    shared = np.where(same, 1.0, 0.0)  # of rows without probabilities
    shared[rows.known] = _shared_probability(rows, field.meaning)
    return {
        "agreement": float(same.mean()),
        **_between(sampled_share(int(same.sum()), len(same))),
        **_worst_row(shared),
        "kl": max(0.0, float(divergence.mean())) if len(divergence) else 0.0,
    }


def _shared_probability(rows: ClassRows, meaning: Meaning) -> Array:
    """1 - total variation of the probabilities of each row that is known; of independent classes, of the worst one."""
    if meaning == "independent_probabilities":
        ours, theirs = (np.clip(side, 0.0, 1.0) for side in (rows.ours, rows.theirs))
        return np.asarray(1 - np.abs(ours - theirs).max(axis=1))
    ours, theirs = (np.exp(CLASS_LOGARITHMS[meaning](side)) for side in (rows.ours, rows.theirs))
    return np.asarray(1 - np.abs(ours - theirs).sum(axis=1) / 2)


def _class_map(ours: Array, theirs: Array, field: TensorSpec) -> Measures:
    """Share of places with the base's best class, where the base has the class that is hit least."""
    counts = PlaceCounts.of(ours, theirs, field, _pieces(theirs))
    shares = counts.shares
    drawn = np.argsort(shares)[:DRAWN_CHANNELS]
    parts = np.concatenate([counts.hits[:, drawn], counts.seen[:, drawn]], axis=1)
    interval = resampled_means(parts, lambda means: ratios(*np.split(means, 2, axis=1)).min(axis=1))
    worst = int(shares.argmin())
    found = {"agreement": float(shares[worst]), "channel": counts.classes[worst]}
    return found | _worst_row(counts.row_shares) | _between(interval)


def _embedding(ours: Array, theirs: Array, _: TensorSpec) -> Measures:
    """Mean cosine of the rows, and how far the order of their similarities is kept."""
    ours, theirs = (np.asarray(array, np.float64).reshape(len(array), -1) for array in (ours, theirs))
    cosines, both = row_cosines(ours, theirs), compared(ours, theirs)
    cosine = float(cosines.mean())
    return {
        "agreement": _share(cosine),
        **_between(resampled_means(cosines[:, None], lambda means: means[:, 0])),
        **_worst_row(cosines),
        "cosine": cosine,
        "rank_agreement": rank_agreement(both.one, both.other),
    }


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
    """Root mean square error of the worst channel, relative to its scale in the base (`toolkit.spread`).

    A channel with a number that is not finite on one side only is wrong altogether: its error is at least 1.
    """
    axis, pieces = channel_axis(field.shape), _pieces(theirs)
    scales = channel_scales([theirs[rows] for rows in pieces], axis)
    count, squares, broken = (np.zeros(len(scales)) for _ in range(3))
    of_rows = np.zeros(len(theirs))
    for rows in pieces:
        missed = _missed(ours[rows], theirs[rows], axis)
        count += missed.numbers.sum(axis=1)
        squares += missed.squares.sum(axis=1)
        broken += missed.broken.sum(axis=1)
        relative = missed.squares / np.square(scales)[:, None]
        of_rows[rows] = np.sqrt(relative.sum(axis=0) / np.maximum(missed.numbers.sum(axis=0), 1))
        of_rows[rows] = np.where(missed.broken.any(axis=0), np.maximum(of_rows[rows], 1.0), of_rows[rows])
    errors = np.sqrt(squares / np.maximum(count, 1)) / scales
    errors = np.where(broken > 0, np.maximum(errors, 1.0), errors)
    found = _worst(errors) | _worst_row(1.0 - of_rows)
    if broken.any():
        return found | _between(Interval(*[_share(1.0 - errors.max())] * 2))
    worst = np.argsort(errors)[-DRAWN_CHANNELS:]
    drawn = [_missed(ours[rows], theirs[rows], axis).mean_squares[worst] for rows in pieces]
    relative = np.concatenate(drawn, axis=1).T / np.square(scales[worst])
    return found | _between(resampled_means(relative, lambda means: 1.0 - np.sqrt(means).max(axis=1)))


class _Missed(NamedTuple):
    """By how much values are missed, all [channels, rows]."""

    squares: Array
    """Sums of the squared differences."""
    numbers: Array
    """Of the numbers that are finite on both sides."""
    broken: Array
    """Of those that are infinite or NaN on one side, and not the same on the other."""

    @property
    def mean_squares(self) -> Array:
        return self.squares / np.maximum(self.numbers, 1)


def _missed(ours: Array, theirs: Array, axis: int | None) -> _Missed:
    one, other = (_by_row(np.asarray(array, np.float64), axis) for array in (ours, theirs))
    finite = both_finite(one, other)
    squares = np.square(np.where(finite, one, 0.0) - np.where(finite, other, 0.0))
    return _Missed(squares.sum(axis=2), finite.sum(axis=2), differ_in_kind(one, other).sum(axis=2))


def _by_row(array: Array, axis: int | None) -> Array:
    """The numbers of every channel and row, [channels, rows, numbers]."""
    channels = by_channel(array, axis)
    return channels.reshape(len(channels), len(array), -1)


def _equal(ours: Array, theirs: Array, field: TensorSpec) -> Measures:
    """Share of whole numbers that are not those of the base, in the worst channel: no index is nearly right."""
    wrong = _by_row(ours != theirs, channel_axis(field.shape)).mean(axis=2)
    interval = resampled_means(wrong.T, lambda means: 1.0 - means.max(axis=1))
    return _worst(wrong.mean(axis=1)) | _worst_row(1.0 - wrong.mean(axis=0)) | _between(interval)


def _worst(errors: Array) -> Measures:
    worst = int(errors.argmax())
    return {"agreement": _share(1.0 - errors[worst]), "error": float(errors[worst]), "channel": worst}


def _worst_row(agreements: Array) -> Measures:
    worst = int(agreements.argmin())
    return {"worst_agreement": _share(agreements[worst]), "worst_row": worst}


def _between(interval: Interval) -> Measures:
    return {"agreement_low": _share(interval.low), "agreement_high": _share(interval.high)}


def _share(value: float) -> float:
    return min(1.0, max(0.0, float(value)))


MEASURES: Final[Mapping[Meaning, MeasureOf]] = {
    **dict.fromkeys(CLASSES, _classes),
    **dict.fromkeys(CLASS_MAPS, _class_map),
    "embedding": _embedding,
    "values": _values,
}
"""By what an output means. Whole numbers are compared as such, whatever they mean."""
