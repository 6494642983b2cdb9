"""What values an activation takes, and the range that 8 bits should cover.

A range that holds every value wastes its 256 steps on a few outliers; one that is too small cuts off what matters. The
four observers draw that line differently:

- minmax: everything seen. No outlier is cut; one of them coarsens all steps.
- percentile: a fixed share of the values (Wu et al., "Integer Quantization for Deep Learning Inference", 2020).
- entropy: least KL divergence of the quantized distribution (Migacz, "8-bit inference with TensorRT", 2017).
- mse: least expected squared error, rounding within the range plus cutting outside of it (Banner et al., 2019).

A histogram has a fixed number of bins whatever the data, so memory does not grow with the number of samples. Exact
zeros (half of what a ReLU gives) are counted apart: zero is always representable, so they must not pull the range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from leanserve.contracts import Array

Observer = Literal["minmax", "percentile", "entropy", "mse"]
Range: TypeAlias = tuple[float, float]
Floats: TypeAlias = NDArray[np.float64]

BINS = 4096
LEVELS = 256
SHARES = np.geomspace(1 / 64, 1.0, 120)
"""Candidate ranges, as shares of everything seen."""
REFINEMENTS = 3
"""Rounds in which `mse` moves each end alone: the two tails of a distribution rarely are alike."""


@dataclass(slots=True)
class Extent:
    """The smallest range that holds zero and all values seen."""

    low: float = 0.0
    high: float = 0.0

    def add(self, values: Array) -> None:
        """Take in an array of any shape. Raises `ValueError` at NaN or infinity."""
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise ValueError("it contains NaN or infinite values")
        self.low, self.high = min(self.low, low), max(self.high, high)


class Histogram:
    """Counts of values in `BINS` bins of equal width over an extent found before."""

    def __init__(self, extent: Extent) -> None:
        self.low, self.high = extent.low, extent.high
        self.width = (self.high - self.low) / BINS
        self.zero = -self.low / self.width if self.width else 0.0
        """Position of the value zero, in bins."""
        self.counts = np.zeros(BINS, np.int64)
        self.zeros = 0

    def add(self, values: Array) -> None:
        """Take in an array of any shape; values beyond the extent go to its outer bins."""
        if not self.width or not values.size:
            return
        self.counts += np.bincount(self._bins(values.ravel()), minlength=BINS)
        zeros = int(values.size - np.count_nonzero(values))
        self.counts[self._bins(np.zeros(1, values.dtype))] -= zeros
        self.zeros += zeros

    def _bins(self, values: Array) -> NDArray[np.intp]:
        scaled = values - np.float32(self.low)
        scaled *= np.float32(1 / self.width)
        bins = scaled.astype(np.intp)
        np.clip(bins, 0, BINS - 1, out=bins)
        return bins

    @property
    def edges(self) -> Floats:
        """The `BINS + 1` borders of the bins."""
        return np.linspace(self.low, self.high, BINS + 1)


FindRange: TypeAlias = Callable[[Histogram], Range]


def range_finder(observer: Observer, percentile: float) -> FindRange | None:
    """What draws the line; `None` where the extent alone decides. `percentile` (50..100) is for that observer only."""
    finders: dict[Observer, FindRange | None] = {
        "minmax": None,
        "percentile": partial(percentile_range, percentile=percentile),
        "entropy": entropy_range,
        "mse": mse_range,
    }
    return finders[observer]


def percentile_range(histogram: Histogram, percentile: float) -> Range:
    """The range that leaves half of the other `100 - percentile` percent out on each side; zeros count as values."""
    counts = histogram.counts.astype(np.float64)
    counts[min(BINS - 1, int(histogram.zero))] += histogram.zeros
    outside = (1 - percentile / 100) / 2 * counts.sum()
    if not counts.any():
        return histogram.low, histogram.high
    below = np.concatenate([[0.0], counts.cumsum()])
    first = int(np.searchsorted(below, outside, side="right")) - 1
    last = int(np.searchsorted(below, below[-1] - outside, side="left"))
    return _around_zero(histogram, max(first, 0), min(last, BINS))


def mse_range(histogram: Histogram) -> Range:
    """The range of least expected squared error: one threshold for both ends first, then each end alone."""
    if not histogram.counts.any():
        return histogram.low, histogram.high
    error = _Error(histogram)
    low, high = min((_clipped(histogram, share) for share in SHARES), key=error)
    for _ in range(REFINEMENTS):
        low, high = min(((histogram.low * share, high) for share in SHARES), key=error)
        low, high = min(((low, histogram.high * share) for share in SHARES), key=error)
    return float(low), float(high)


def entropy_range(histogram: Histogram) -> Range:
    """The range whose quantized distribution diverges least from what was seen, outliers moved to its ends."""
    if not histogram.counts.any():
        return histogram.low, histogram.high
    counts = histogram.counts.astype(np.float64)
    first, last = min(_slices(histogram), key=lambda ends: _divergence(counts, *ends))
    return _around_zero(histogram, first, last)


def _clipped(histogram: Histogram, share: float) -> Range:
    """What is seen up to a threshold on the magnitude, the given share of the largest."""
    limit = max(-histogram.low, histogram.high) * share
    return max(histogram.low, -limit), min(histogram.high, limit)


def _around_zero(histogram: Histogram, first: int, last: int) -> Range:
    """The range from the lower edge of bin `first` to that of bin `last`, widened to hold zero."""
    edges = histogram.edges
    return min(0.0, float(edges[first])), max(0.0, float(edges[last]))


class _Error:
    """Expected squared error of quantizing to a range: step^2 / 12 for what lies inside, the cut distance outside.

    Cumulated moments make each range a constant amount of work.
    """

    def __init__(self, histogram: Histogram) -> None:
        edges = histogram.edges
        counts = histogram.counts.astype(np.float64)
        self._centres = centres = (edges[:-1] + edges[1:]) / 2
        self._moments = np.stack(
            [np.concatenate([[0.0], (counts * centres**power).cumsum()]) for power in range(3)], axis=1
        )

    def __call__(self, ends: Range) -> float:
        low, high = ends
        first, last = np.searchsorted(self._centres, [low, high])
        below, through, total = self._moments[first], self._moments[last], self._moments[-1]
        step = (high - low) / (LEVELS - 1)
        inside = (through - below)[0] * step**2 / 12
        return float(inside + _squared_distance(below, low) + _squared_distance(total - through, high))


def _squared_distance(moments: Floats, point: float) -> float:
    """Sum of `(x - point)^2` over values with these zeroth, first and second moments."""
    return float(moments[2] - 2 * point * moments[1] + point**2 * moments[0])


def _slices(histogram: Histogram) -> Iterator[tuple[int, int]]:
    """Bins up to a threshold on the magnitude, from all of them down to one bin per level."""
    for share in SHARES[::-1]:
        low, high = _clipped(histogram, share)
        first, last = round((low - histogram.low) / histogram.width), round((high - histogram.low) / histogram.width)
        if last - first >= LEVELS:
            yield first, last


def _divergence(counts: Floats, first: int, last: int) -> float:
    """KL divergence (nats) between the clipped distribution and the one that `LEVELS` steps can tell apart."""
    inside = counts[first:last]
    clipped = inside.copy()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[last:].sum()
    filled = inside > 0
    bounds = np.linspace(0, last - first, LEVELS, endpoint=False).astype(np.intp)
    sums, occupied = np.add.reduceat(inside, bounds), np.add.reduceat(filled.astype(np.float64), bounds)
    means = np.divide(sums, occupied, out=np.zeros_like(sums), where=occupied > 0)
    spread = np.repeat(means, np.diff([*bounds, last - first])) * filled
    if not spread.any():
        return float("inf")
    seen = clipped > 0
    p, q = clipped[seen] / clipped.sum(), spread[seen] / spread.sum()
    return float((p * np.log(p / np.maximum(q, 1e-9))).sum())
