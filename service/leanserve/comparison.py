"""How far two arrays of answers are apart, where some of them are infinite.

Masked logits are -inf, and `inf - inf` is NaN: a tolerance relative to the largest value then passes anything, and a
mean is lost. Here infinities that are equal on both sides are equal, NaN is like NaN alone, finite numbers decide every
scale, and a result can always be written as JSON.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from leanserve.contracts import Array

UNLIKE = float(np.finfo(np.float32).max)
"""Stands for the difference between an infinity or NaN and anything else."""


class Compared(NamedTuple):
    """Two arrays as float64, finite everywhere."""

    one: NDArray[np.float64]
    other: NDArray[np.float64]
    unlike: NDArray[np.bool_]
    """Where one is infinite or NaN and the other is something else. There, and where both are the same infinity or NaN,
    `one` and `other` are 0."""


def compared(one: Array, other: Array) -> Compared:
    """Two arrays of the same shape with everything taken out that is infinite or NaN."""
    ours, theirs = np.asarray(one, np.float64), np.asarray(other, np.float64)
    finite = both_finite(ours, theirs)
    return Compared(np.where(finite, ours, 0.0), np.where(finite, theirs, 0.0), differ_in_kind(ours, theirs))


def both_finite(one: Array, other: Array) -> NDArray[np.bool_]:
    """Where both are numbers that can be compared by their difference."""
    return np.asarray(np.isfinite(one) & np.isfinite(other))


def differ_in_kind(one: Array, other: Array) -> NDArray[np.bool_]:
    """Where something is infinite or NaN in one of the two and not the same in the other; NaN is the same as NaN."""
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    return np.asarray(~(both_finite(one, other) | same))


def largest_difference(one: Array, other: Array) -> float:
    """The largest absolute difference of two arrays of the same shape; `UNLIKE` where infinities or NaN differ."""
    pair = compared(one, other)
    return UNLIKE if pair.unlike.any() else float(np.abs(pair.one - pair.other).max(initial=0.0))


def largest_finite(values: Array) -> float:
    """The largest absolute value among those that are finite; 0 without any."""
    finite = np.asarray(values, np.float64)
    return float(np.abs(finite[np.isfinite(finite)]).max(initial=0.0))


def row_cosines(one: Array, other: Array) -> NDArray[np.float64]:
    """Cosine similarity of each row [rows, D] with its counterpart, without what is equally infinite in both.

    Rows that are equal have 1, those of zeros or infinities alone too; rows of which one is infinite or NaN where the
    other is not have 0.
    """
    pair = compared(one, other)
    norms = np.linalg.norm(pair.one, axis=1) * np.linalg.norm(pair.other, axis=1)
    cosines = np.sum(pair.one * pair.other, axis=1) / np.maximum(norms, 1e-12)
    cosines[(pair.one == pair.other).all(axis=1)] = 1.0
    cosines[pair.unlike.any(axis=1)] = 0.0
    return np.asarray(cosines)
