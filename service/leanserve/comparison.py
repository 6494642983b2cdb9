"""How far two arrays of answers are apart, where some of them are infinite.

Masked logits are -inf, and `inf - inf` is NaN: a tolerance relative to the largest value then passes anything, and a
mean is lost. Here infinities that are equal on both sides are equal, NaN is like NaN alone, finite numbers decide every
scale, and a result can always be written as JSON. Outputs of classes are compared by their probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from leanserve.contracts import Array, Meaning, TensorSpec

UNLIKE = float(np.finfo(np.float32).max)
"""Stands for the difference between an infinity or NaN and anything else."""
LEAST_PROBABILITY = float(np.finfo(np.float64).tiny)
"""In place of 0, so that a class which one side rules out makes a divergence large and not infinite."""
MOST_LOGARITHM = 100.0
"""In place of greater ones, which no probability has, for the same reason."""
NO_CLASS = -1
"""The best class of a place with NaN or +inf in it, or where every class is ruled out."""
PRESENT = 0.5
"""Independent probability from which on a class is there."""


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


class ClassRows(NamedTuple):
    """Rows of class outputs in double precision: those without NaN on either side and with a possible class (a row of
    -inf alone has no probabilities), and which of all agree.

    A row with a NaN on one side only does not agree. +inf is no more of a number than NaN.
    """

    ours: Array
    theirs: Array
    known: NDArray[np.bool_]
    """Which of all rows are among these."""
    same_best: NDArray[np.bool_]
    """Of all rows: whether both sides have the same best class."""

    @classmethod
    def of(cls, ours: Array, theirs: Array) -> Self:
        """Those of two outputs [rows, classes] of the same rows."""
        ours, theirs = (np.where(array == np.inf, np.nan, np.asarray(array, np.float64)) for array in (ours, theirs))
        missing = np.isnan(ours), np.isnan(theirs)
        answered = np.isfinite(ours.max(axis=1)), np.isfinite(theirs.max(axis=1))
        alike = (missing[0] == missing[1]).all(axis=1) & (answered[0] == answered[1])
        same = alike & (ours.argmax(axis=1) == theirs.argmax(axis=1))
        known = np.asarray(answered[0] & answered[1])
        return cls(ours[known], theirs[known], known, same)


def class_divergence(rows: ClassRows, meaning: Meaning) -> NDArray[np.float64]:
    """KL divergence (nats) of our probabilities from theirs for each row that is known; of one of `CLASSES`.

    Divergences of independent classes add up. Rounding may leave a number just below 0.
    """
    if meaning != "independent_probabilities":
        logarithms = CLASS_LOGARITHMS[meaning]
        return _divergence(logarithms(rows.ours), logarithms(rows.theirs))
    shares = [np.clip(array, 0.0, 1.0) for array in (rows.ours, rows.theirs)]
    present, absent = (_divergence(*map(_log, sides)) for sides in (shares, [1 - share for share in shares]))
    return np.asarray(present + absent)


def same_classes(rows: ClassRows, ours: Array, theirs: Array, meaning: Meaning) -> NDArray[np.bool_]:
    """Of each row of two outputs [rows, classes], and of `rows` made of them, whether both sides answer the same: the
    best class, and of independent ones all that are `PRESENT`."""
    same = rows.same_best
    if meaning != "independent_probabilities":
        return same
    return np.asarray(same & ((np.asarray(ours) >= PRESENT) == (np.asarray(theirs) >= PRESENT)).all(axis=1))


def best_classes(output: Array, field: TensorSpec) -> NDArray[np.int64]:
    """The best class of every place [rows, places] of an output of `contracts.CLASS_MAPS`, as it is or flattened."""
    first = field.meaning == "classes_first"
    count, axis = (field.shape[0], 1) if first else (field.shape[-1], 2)
    assert count is not None  # `bases.meanings` asks for that
    numbers = output.reshape(len(output), *((count, -1) if first else (-1, count)))
    return np.where(np.isfinite(numbers.max(axis=axis)), numbers.argmax(axis=axis), NO_CLASS)


def _divergence(ours: Array, theirs: Array) -> NDArray[np.float64]:
    """KL divergence of ours from theirs, [rows], both as logarithms of probabilities [rows, classes].

    The sums are part of it, so that it is at least 0 also where ours are not 1, as those of a softmax in 8 bits.
    """
    shares = np.exp(theirs)
    return np.asarray(np.sum(shares * (theirs - ours) - shares + np.exp(ours), axis=1))


def _log_softmax(logits: Array) -> Array:
    from scipy.special import log_softmax

    return _within(log_softmax(logits, axis=1))


def _log(probabilities: Array) -> Array:
    return _within(np.log(np.maximum(probabilities, LEAST_PROBABILITY)))


def _within(logarithms: Array) -> Array:
    return np.clip(logarithms, math.log(LEAST_PROBABILITY), MOST_LOGARITHM)


CLASS_LOGARITHMS: Final[Mapping[Meaning, Callable[[Array], Array]]] = {
    "logits": _log_softmax,
    "probabilities": _log,
    "log_probabilities": _within,
}
"""Outputs [rows, classes] -> logarithms of probabilities, by what they mean."""
