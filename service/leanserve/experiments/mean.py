"""What is the mean of numbers without known bounds (seconds, joules, divergences)? An answer at any look.

Asymptotic confidence sequences (Waudby-Smith et al. 2024, "Time-uniform central limit theory") ask for a finite
variance alone. They promise their level in the limit, from some 50 observations on, and not before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from leanserve.experiments.interval import Interval

FEWEST = 50
"""Observations before which nothing is said."""
EXPECTED = 1000
"""Observations at which the sequence is narrowest; it is valid at all numbers."""


@dataclass(frozen=True, slots=True)
class MeanSums:
    """Count, mean and sum of squared deviations of numbers: all that the mean's interval needs."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, values: Iterable[float] | NDArray[np.float64]) -> Self:
        """Those of finite numbers."""
        array = np.asarray(values if isinstance(values, np.ndarray) else list(values), np.float64)
        if not array.size:
            return cls()
        mean = float(array.mean())
        return cls(float(array.size), mean, float(np.square(array - mean).sum()))

    def merged(self, other: MeanSums) -> MeanSums:
        """Those of both together (Chan et al. 1979)."""
        count = self.count + other.count
        if not count:
            return MeanSums()
        gap, weight = other.mean - self.mean, other.count / count
        squares = self.squares + other.squares + gap * gap * self.count * weight
        return MeanSums(count, self.mean + gap * weight, squares)

    def scaled(self, factor: float) -> MeanSums:
        """Those of `factor` times as many numbers of the same kind."""
        return MeanSums(self.count * factor, self.mean, self.squares * factor)

    @property
    def deviation(self) -> float:
        """Standard deviation; 0 without numbers."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0


def mean_interval(moments: MeanSums, alpha: float) -> Interval:
    """Confidence sequence of the mean at level alpha; unbounded with fewer than `FEWEST` numbers."""
    radius = float(radius_of_mean(moments.count, moments.deviation, alpha))
    return Interval(moments.mean - radius, moments.mean + radius)


def radius_of_mean(
    count: ArrayLike, deviation: ArrayLike, alpha: float, expected: float = EXPECTED
) -> NDArray[np.float64]:
    """Half the width of the confidence sequence of a mean, of any shape.

    s sqrt(2 (n r + 1) / (n^2 r) log(sqrt(n r + 1) / alpha)), where r makes it narrowest at `expected` observations.
    """
    n, twice = np.asarray(count, np.float64), -2.0 * math.log(alpha)
    spread = (twice + math.log(twice) + 1.0) / expected
    grown = n * spread + 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        radius = deviation * np.sqrt(2.0 * grown / (n * n * spread) * np.log(np.sqrt(grown) / alpha))
    return np.where(n < FEWEST, np.inf, radius)


@dataclass(frozen=True, slots=True)
class RatioSums:
    """Sums over batches of a value (device seconds, joules) and of their rows, for the value per row.

    Rows of one batch share its cost, so they say nothing new about it: the batch is the observation, and not the row.
    """

    batches: float = 0.0
    value: float = 0.0
    rows: float = 0.0
    value_squares: float = 0.0
    products: float = 0.0
    rows_squares: float = 0.0

    @classmethod
    def of(cls, value: float, rows: float) -> Self:
        """Those of one batch."""
        return cls(1.0, value, rows, value * value, value * rows, rows * rows)

    def merged(self, other: RatioSums) -> RatioSums:
        """Those of both together."""
        return RatioSums(
            self.batches + other.batches,
            self.value + other.value,
            self.rows + other.rows,
            self.value_squares + other.value_squares,
            self.products + other.products,
            self.rows_squares + other.rows_squares,
        )

    def scaled(self, factor: float) -> RatioSums:
        """Those of `factor` times as many batches of the same kind."""
        return RatioSums(
            self.batches * factor,
            self.value * factor,
            self.rows * factor,
            self.value_squares * factor,
            self.products * factor,
            self.rows_squares * factor,
        )

    @property
    def per_row(self) -> float:
        """The value per row; 0 without rows."""
        return self.value / self.rows if self.rows else 0.0

    def interval(self, alpha: float) -> Interval:
        """Confidence sequence of the value per row, not below 0: that of the mean residual, value - per_row x rows."""
        if not self.rows:
            return Interval(0.0, math.inf)
        ratio = self.per_row
        squares = self.value_squares - 2 * ratio * self.products + ratio * ratio * self.rows_squares
        deviation = math.sqrt(max(0.0, squares) / self.batches)
        radius = float(radius_of_mean(self.batches, deviation, alpha)) * self.batches / self.rows
        return Interval(max(0.0, ratio - radius), ratio + radius)
