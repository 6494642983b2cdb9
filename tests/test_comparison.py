"""Equal infinities are equal, NaN is like NaN alone, finite numbers decide the scale, and no result is NaN."""

from __future__ import annotations

import numpy as np
import pytest

from leanserve.comparison import UNLIKE, largest_difference, largest_finite, row_cosines
from leanserve.contracts import Array

INF, NAN = np.inf, np.nan


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        ([1.0, -INF], [1.5, -INF], 0.5),
        ([INF, -INF, NAN], [INF, -INF, NAN], 0.0),
        ([-INF, 1.0], [INF, 1.0], UNLIKE),
        ([-INF, 1.0], [0.0, 1.0], UNLIKE),
        ([NAN, 1.0], [0.0, 1.0], UNLIKE),
        ([NAN, 1.0], [INF, 1.0], UNLIKE),
        ([], [], 0.0),
    ],
)
def test_the_largest_difference(one: list[float], other: list[float], difference: float) -> None:
    assert largest_difference(np.array(one), np.array(other)) == difference
    assert largest_difference(np.array(other), np.array(one)) == difference


@pytest.mark.parametrize(("values", "largest"), [([1.0, -3.0, -INF, NAN], 3.0), ([INF, NAN], 0.0), ([], 0.0)])
def test_the_largest_finite_value(values: list[float], largest: float) -> None:
    assert largest_finite(np.array(values)) == largest


@pytest.mark.parametrize(
    ("one", "other", "cosine"),
    [
        ([3.0, 4.0, -INF], [3.0, 4.0, -INF], 1.0),
        ([1.0, 0.0, -INF], [0.0, 1.0, -INF], 0.0),
        ([3.0, 4.0, -INF], [4.0, 3.0, -INF], 0.96),
        ([-INF, INF, NAN], [-INF, INF, NAN], 1.0),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], 1.0),
        ([1.0, 2.0, NAN], [1.0, 2.0, 3.0], 0.0),
    ],
)
def test_cosines_leave_out_what_is_equally_infinite(one: list[float], other: list[float], cosine: float) -> None:
    def rows(values: list[float]) -> Array:
        return np.array([values, [1.0, 1.0, 1.0]])

    np.testing.assert_allclose(row_cosines(rows(one), rows(other)), [cosine, 1.0], rtol=1e-12)
