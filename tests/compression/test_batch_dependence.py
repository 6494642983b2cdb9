"""The number that says how far a row's answer depends on its batch: exact for backends made to depend on it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from service.compression.batch_dependence import COMPANY, GOLDEN, batch_dependence
from service.contracts import Array, Arrays, Field, InputSpec

ROW = InputSpec((Field("x", "float32", (3,)),), (Field("y", "float32", (3,)),))
TOKENS = InputSpec((Field("ids", "int64", (None,), 7), Field("mask", "int64", (None,))), (Field("y", "float32", (1,)),))


class Rule:
    """Answers by a function and remembers the batches' shapes."""

    name = "rule"
    self_contained = False
    device = "cpu"
    row_buckets: tuple[int, ...] = ()

    def __init__(self, answer: Callable[..., Array | Arrays]) -> None:
        self.answer = answer
        self.shapes: list[tuple[int, ...]] = []

    def run(self, batch: Arrays) -> Arrays:
        self.shapes.append(batch[0].shape)
        answer = self.answer(*batch)
        return answer if isinstance(answer, tuple) else (answer,)

    def close(self) -> None: ...


def one_scale(x: Array) -> Array:
    """What per-tensor dynamic quantization does: the largest value of the batch decides the steps of all rows."""
    scale = np.abs(x).max() / 127
    return np.asarray(np.round(x / scale) * scale)


@pytest.mark.parametrize("rows", [3, 8, 40])
def test_rows_run_alone_then_together_then_in_a_crowd(rows: int) -> None:
    backend = Rule(lambda x: x * 2)
    assert batch_dependence(backend, ROW, ROW.example(rows)) == 0.0
    golden = min(rows, GOLDEN)
    assert [shape[0] for shape in backend.shapes] == [1] * golden + [golden, COMPANY]


def test_the_largest_change_counts_relative_to_the_largest_output() -> None:
    backend = Rule(lambda x: x + (len(x) >= COMPANY) * 0.5)
    rows = (np.tile(np.array([0, 1, -4], np.float32), (8, 1)),)
    assert batch_dependence(backend, ROW, rows) == pytest.approx(0.5 / 4)


def test_one_scale_for_a_whole_batch_shows() -> None:
    rows = (np.linspace(0.01, 1, 24, dtype=np.float32).reshape(8, 3),)
    assert batch_dependence(Rule(one_scale), ROW, rows) > 1e-3


def test_shorter_rows_are_padded_in_company_with_the_pad_of_their_field() -> None:
    seen: list[int] = []

    def masked_sum(ids: Array, mask: Array) -> Array:
        seen.extend(ids[mask == 0].tolist())
        return np.asarray((ids * mask).sum(1, keepdims=True))

    rows = (np.ones((8, 10), np.int64), np.ones((8, 10), np.int64))
    backend = Rule(masked_sum)
    assert batch_dependence(backend, TOKENS, rows) == 0.0
    assert [shape[1] for shape in backend.shapes] == [6, 7, 7, 8, 9, 9, 10, 10, 10, 10]
    assert seen
    assert set(seen) == {7}


def test_padding_that_leaks_into_the_answer_shows() -> None:
    rows = (np.ones((8, 10), np.int64), np.ones((8, 10), np.int64))
    leaking = Rule(lambda ids, mask: np.asarray(ids.sum(1, keepdims=True)))
    assert batch_dependence(leaking, TOKENS, rows) == pytest.approx(4 * 7 / 10)


def test_answers_at_padded_positions_are_left_out() -> None:
    backend = Rule(lambda ids, _: ids.astype(np.float32))
    per_token = InputSpec(TOKENS.fields, (Field("y", "float32", (None,)),))
    assert batch_dependence(backend, per_token, (np.ones((8, 10), np.int64),) * 2) == 0.0


def test_every_output_counts_relative_to_its_own_largest_value() -> None:
    spec = InputSpec(ROW.fields, (*ROW.outputs, Field("z", "float32", (3,)), Field("n", "int64", ())))
    second = Rule(lambda x: (x * 1000, x + (len(x) >= COMPANY) * 0.5, np.arange(len(x)) * 0))
    rows = (np.tile(np.array([0, 1, -4], np.float32), (8, 1)),)
    assert batch_dependence(second, spec, rows) == pytest.approx(0.5 / 4)


def test_what_is_not_finite_depends_where_it_changes() -> None:
    masked = Rule(lambda x: np.where(x > 0, x, -np.inf))
    rows = (np.tile(np.array([0, 1, -4], np.float32), (8, 1)),)
    assert batch_dependence(masked, ROW, rows) == 0.0
    lost = Rule(lambda x: x * (np.nan if len(x) >= COMPANY else 1))
    assert batch_dependence(lost, ROW, rows) == 1.0


def test_outputs_of_zero_are_no_division_by_zero() -> None:
    assert batch_dependence(Rule(lambda x: x * 0), ROW, ROW.example(8)) == 0.0


def test_infinities_count_only_where_company_changes_them() -> None:
    def masked(x: Array) -> Array:
        return np.where(np.arange(3) == 0, -np.inf, x + (len(x) >= COMPANY) * 0.5)

    rows = (np.tile(np.array([0, 1, -4], np.float32), (8, 1)),)
    assert batch_dependence(Rule(masked), ROW, rows) == pytest.approx(0.5 / 4)
    overflowing = Rule(lambda x: x + (np.inf if len(x) >= COMPANY else 0))
    assert 1 <= batch_dependence(overflowing, ROW, rows) < np.inf
