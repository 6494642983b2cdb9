from __future__ import annotations

import numpy as np
import pytest

from leanserve.contracts import Array
from leanserve.passes.toolkit.histograms import BINS, Extent, Histogram, Observer, Range, range_finder

OBSERVERS: tuple[Observer, ...] = ("minmax", "percentile", "entropy", "mse")
RANDOM = np.random.default_rng(0)
GAUSSIAN = RANDOM.standard_normal(200_000).astype(np.float32)


def with_outliers(share: float, size: float) -> Array:
    values = GAUSSIAN.copy()
    values[: int(share * values.size)] = size
    return values


def seen(values: Array) -> Histogram:
    extent = Extent()
    extent.add(values)
    histogram = Histogram(extent)
    histogram.add(values)
    return histogram


def chosen(observer: Observer, values: Array, percentile: float = 99.99) -> Range:
    histogram = seen(values)
    find = range_finder(observer, percentile)
    return find(histogram) if find else (histogram.low, histogram.high)


def quantization_error(values: Array, ends: Range) -> float:
    """Mean squared error of really quantizing to 8 bits."""
    step = (ends[1] - ends[0]) / 255
    zero = round(-ends[0] / step)
    quantized = (np.clip(np.round(values / step) + zero, 0, 255) - zero) * step
    return float(np.mean((quantized - values) ** 2))


def test_an_extent_holds_zero_and_all_values() -> None:
    extent = Extent()
    extent.add(np.array([[3.0, 5.0]], np.float32))
    assert (extent.low, extent.high) == (0.0, 5.0)
    extent.add(np.array([], np.float32))
    extent.add(np.array([-2.0], np.float32))
    assert (extent.low, extent.high) == (-2.0, 5.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_extent_refuses_what_has_no_range(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        Extent().add(np.array([1.0, bad], np.float32))


def test_a_histogram_counts_every_value_once_whatever_the_batches() -> None:
    values = np.maximum(GAUSSIAN, 0)
    whole, pieces = seen(values), Histogram(Extent(0.0, float(values.max())))
    for piece in np.array_split(values.reshape(100, 40, 50), 7):
        pieces.add(piece)
    assert whole.counts.sum() + whole.zeros == values.size
    assert whole.zeros == (values == 0).sum()
    assert np.array_equal(whole.counts, pieces.counts)
    assert (whole.counts >= 0).all()
    assert len(whole.edges) == BINS + 1


def test_values_beyond_the_extent_are_counted_at_its_ends() -> None:
    histogram = Histogram(Extent(-1.0, 1.0))
    histogram.add(np.array([-5.0, 7.0, 7.0], np.float32))
    assert (histogram.counts[0], histogram.counts[-1]) == (1, 2)


def test_outliers_are_kept_by_minmax_and_cut_by_percentile_and_entropy() -> None:
    values = with_outliers(2e-5, 60.0)
    assert chosen("minmax", values)[1] == 60
    assert chosen("percentile", values)[1] < 6
    assert chosen("entropy", values)[1] < 30


def test_mse_weighs_cutting_against_rounding() -> None:
    """Few mild outliers are cut; as many far ones cost more to cut than to keep."""
    assert chosen("mse", with_outliers(2e-5, 6.0))[1] < 5.5
    assert chosen("mse", with_outliers(2e-5, 60.0))[1] > 50


@pytest.mark.parametrize(
    "values",
    [GAUSSIAN, np.maximum(GAUSSIAN, 0), RANDOM.laplace(size=200_000).astype(np.float32), with_outliers(1e-4, -20.0)],
    ids=["gaussian", "relu", "laplace", "one tail"],
)
def test_mse_has_the_least_error_of_all(values: Array) -> None:
    errors = {observer: quantization_error(values, chosen(observer, values)) for observer in OBSERVERS}
    assert errors["mse"] <= 1.01 * min(errors.values())
    assert errors["mse"] < 0.97 * errors["minmax"]


def test_all_four_draw_the_line_elsewhere() -> None:
    values = RANDOM.laplace(size=200_000).astype(np.float32)
    ends = {chosen(observer, values) for observer in OBSERVERS}
    assert len(ends) == 4


@pytest.mark.parametrize("observer", OBSERVERS)
def test_nothing_is_cut_where_everything_is_as_frequent(observer: Observer) -> None:
    low, high = chosen(observer, RANDOM.uniform(-1, 3, 200_000).astype(np.float32))
    assert low == pytest.approx(-1, abs=0.01)
    assert high == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize(("value", "expected"), [(0.0, (0, 0)), (5.0, (0, 5)), (-5.0, (-5, 0))])
def test_a_constant_keeps_its_value(observer: Observer, value: float, expected: Range) -> None:
    low, high = chosen(observer, np.full(1000, value, np.float32))
    assert (low, high) == pytest.approx(expected, abs=5 / BINS)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_range_holds_zero_and_lies_in_what_was_seen(observer: Observer) -> None:
    for values in (GAUSSIAN + 10, GAUSSIAN - 10, GAUSSIAN):
        low, high = chosen(observer, values)
        assert min(values.min(), 0) - 1e-5 <= low <= 0 <= high <= max(values.max(), 0) + 1e-5


def test_a_smaller_percentile_cuts_more_and_100_cuts_nothing() -> None:
    ends = [chosen("percentile", GAUSSIAN, share)[1] for share in (90, 99, 99.9, 100)]
    assert ends == sorted(ends)
    assert ends[0] == pytest.approx(1.645, abs=0.01), "5 percent of a gaussian lie above"
    assert chosen("percentile", GAUSSIAN, 100) == pytest.approx((GAUSSIAN.min(), GAUSSIAN.max()), abs=1e-5)


def test_zeros_count_as_values_for_a_percentile() -> None:
    values = np.where(np.arange(10_000) < 9_000, 0.0, np.linspace(1, 2, 10_000)).astype(np.float32)
    assert chosen("percentile", values, 80)[1] == pytest.approx(0, abs=2 / BINS)
