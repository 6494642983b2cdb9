"""The cost table: buckets, the knee, predictions, learning."""

from __future__ import annotations

import pytest

from service.serving.costs import CostTable, buckets_up_to


@pytest.mark.parametrize(("most", "buckets"), [(1, (1,)), (2, (1, 2)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12))])
def test_buckets_are_powers_of_two_and_the_maximum(most: int, buckets: tuple[int, ...]) -> None:
    assert buckets_up_to(most) == buckets


@pytest.mark.parametrize(
    ("most", "compiled", "buckets"), [(32, (1, 8), (1, 8)), (20, (32, 8, 1), (1, 8)), (8, (64, 32), (32,))]
)
def test_compiled_shapes_are_the_only_buckets(most: int, compiled: tuple[int, ...], buckets: tuple[int, ...]) -> None:
    assert buckets_up_to(most, compiled) == buckets


def test_the_knee_is_the_smallest_batch_near_the_best_throughput() -> None:
    falling = CostTable({1: 0.010, 2: 0.016, 4: 0.0305, 8: 0.060, 16: 0.200})
    assert falling.knee == 4  # 8 rows are 1.6 % faster per row: not worth the latency
    rising = CostTable({1: 0.010, 8: 0.011, 32: 0.012})
    assert rising.knee == 32


def test_predictions_interpolate_and_drain_in_batches_of_the_knee() -> None:
    costs = CostTable({1: 1.0, 4: 2.0, 8: 3.0})
    assert costs.seconds(2) == pytest.approx(1 + 1 / 3)
    assert costs.seconds(6) == pytest.approx(2.5)
    assert costs.seconds(100) == pytest.approx(3.0)
    assert costs.knee == 8
    assert costs.drain_seconds(17) == pytest.approx(3 + 3 + 1)
    assert costs.drain_seconds(0) == 0.0


def test_observations_move_the_estimate_of_their_bucket_only() -> None:
    costs = CostTable({1: 1.0, 4: 2.0})
    for _ in range(100):
        costs.observe(4, 1.0)
        costs.observe(3, 99.0)
    assert costs.table()[1] == 1.0
    assert costs.table()[4] == pytest.approx(1.0, abs=0.01)
