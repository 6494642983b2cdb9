"""The cost table: buckets, the knee, predictions, learning."""

from __future__ import annotations

import pytest

from leanserve.runtime.costs import Costs, CostTable, buckets_up_to, length_buckets


@pytest.mark.parametrize(("most", "buckets"), [(1, (1,)), (2, (1, 2)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12))])
def test_buckets_are_powers_of_two_and_the_maximum(most: int, buckets: tuple[int, ...]) -> None:
    assert buckets_up_to(most) == buckets


@pytest.mark.parametrize(
    ("most", "compiled", "buckets"), [(32, (1, 8), (1, 8)), (20, (32, 8, 1), (1, 8)), (8, (64, 32), (32,))]
)
def test_compiled_shapes_are_the_only_buckets(most: int, compiled: tuple[int, ...], buckets: tuple[int, ...]) -> None:
    assert buckets_up_to(most, compiled) == buckets


def test_the_knee_is_the_smallest_batch_near_the_best_throughput() -> None:
    falling = CostTable({1: 0.010, 2: 0.016, 4: 0.0302, 8: 0.060, 16: 0.200})
    assert falling.knee == 4  # 8 rows are 0.7 % faster per row: not worth the latency
    rising = CostTable({1: 0.010, 8: 0.011, 32: 0.012})
    assert rising.knee == 32


def test_the_knee_of_a_tiny_model_counts_what_a_batch_costs_besides_its_run() -> None:
    assert CostTable({1: 9e-6, 8: 11e-6, 16: 10e-6, 32: 22e-6}).knee == 32  # half as many batches to form and hand out


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


def test_a_single_slow_batch_teaches_little_but_a_slower_model_is_followed() -> None:
    costs = CostTable({1: 1.0})
    costs.observe(1, 1000.0)
    assert costs.table()[1] == pytest.approx(1.1)
    for _ in range(100):
        costs.observe(1, 50.0)
    assert costs.table()[1] == pytest.approx(50.0, rel=0.05)


def test_a_compiled_batch_costs_what_its_padded_shape_costs_and_is_never_fuller_than_the_limit() -> None:
    costs = CostTable({1: 1.0, 8: 3.0}, shapes="compiled")
    assert [costs.seconds(rows) for rows in (1, 2, 7, 8)] == [1.0, 3.0, 3.0, 3.0]
    assert costs.drain_seconds(10) == pytest.approx(6.0)
    limited = CostTable({16: 2.0}, most=4, shapes="compiled")
    assert (limited.knee, limited.drain_seconds(8)) == (4, 4.0)


@pytest.mark.parametrize(
    ("longest", "buckets"), [(512, (16, 32, 64, 128, 256, 512)), (100, (16, 32, 64, 100)), (16, (16,)), (7, (7,))]
)
def test_length_buckets_are_powers_of_two_and_the_longest(longest: int, buckets: tuple[int, ...]) -> None:
    assert length_buckets(longest) == buckets


def test_costs_are_summed_over_length_buckets() -> None:
    short, long = CostTable({1: 1.0, 8: 2.0}), CostTable({1: 4.0, 2: 8.0})
    costs = Costs((short, long), (16, 64))
    assert (short.knee, long.knee) == (8, 1)
    assert costs.drain_seconds([9, 2]) == pytest.approx(2.0 + 1.0 + 2 * 4.0)
    assert costs.turn_seconds([9, 0]) == 2.0
    assert costs.turn_seconds([1, 5]) == 4.0
    assert (costs.turn_seconds([0, 0]), costs.drain_seconds([0, 0])) == (0.0, 0.0)
    assert costs.table() == long.table(), "64 is the typical length"
    assert Costs([short]).table() == short.table()


def observed(costs: CostTable, seconds: dict[int, float], looks: int) -> list[int]:
    """The knee after each look, while batches take so long."""
    knees = []
    for _ in range(looks):
        for rows in [rows for rows in seconds if rows <= costs.knee]:
            for _ in range(3):
                costs.observe(rows, seconds[rows])
        costs.follow()
        knees.append(costs.knee)
    return knees


QUIET, CROWDED = {1: 1.0, 2: 1.5, 4: 2.5, 8: 4.0, 16: 20.0}, {1: 1.2, 2: 1.8, 4: 3.0, 8: 12.0, 16: 60.0}


def test_the_knee_follows_what_batches_cost_and_comes_back() -> None:
    costs = CostTable(QUIET)
    assert (costs.knee, costs.reach) == (8, 8)
    assert set(observed(costs, QUIET, 100)) == {8}
    assert observed(costs, CROWDED, 30)[-1] == 4
    assert {4, 8} >= set(observed(costs, CROWDED, 500)), "8 rows are tried again now and then"
    crowded = observed(costs, CROWDED, 1000)
    assert crowded.count(8) < 0.3 * len(crowded)
    assert observed(costs, QUIET, 300)[-1] == 8
    assert max(observed(costs, dict.fromkeys(QUIET, 1.0), 500)) == 8, "no further than there is memory for sure"


def test_the_knee_does_not_move_for_what_is_worth_nothing() -> None:
    costs = CostTable({1: 1.0, 2: 1.99, 4: 3.94})
    assert costs.knee == 4
    assert set(observed(costs, {1: 1.0, 2: 1.98, 4: 3.97}, 100)) == {4}


def test_a_knee_between_the_measured_sizes_stays() -> None:
    costs = CostTable({1: 1.0, 8: 2.0}, most=4)
    assert not costs.follow()
    assert costs.knee == 4
