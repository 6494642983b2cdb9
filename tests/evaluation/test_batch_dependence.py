"""The number that says how far a row's answer depends on its batch: exact for backends made to depend on it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from leanserve.config.variant_section import GateConfig
from leanserve.contracts import Array, Arrays, ModelSpec, Result, TensorSpec
from leanserve.evaluation.batch_dependence import COMPANY, GOLDEN, RUINED, batch_dependence
from leanserve.evaluation.gate import judged
from report_samples import artifact

ROW = ModelSpec((TensorSpec("x", "float32", (3,)),), (TensorSpec("y", "float32", (3,)),))
TOKENS = ModelSpec(
    (TensorSpec("ids", "int64", (None,), 7), TensorSpec("mask", "int64", (None,))), (TensorSpec("y", "float32", (1,)),)
)


class Rule:
    """Answers by a function and remembers the batches' shapes."""

    name = "rule"
    self_contained = False
    device = "cpu"
    row_buckets: tuple[int, ...] = ()

    def __init__(self, answer: Callable[..., Array | Arrays]) -> None:
        self.answer = answer
        self.shapes: list[tuple[int, ...]] = []

    def run(self, batch: Arrays) -> Result:
        self.shapes.append(batch[0].shape)
        answer = self.answer(*batch)
        return Result(answer if isinstance(answer, tuple) else (answer,))

    def close(self) -> None: ...


def one_scale(x: Array) -> Array:
    """What per-tensor dynamic quantization does: the largest value of the batch decides the steps of all rows."""
    scale = np.abs(x).max() / 127
    return np.asarray(np.round(x / scale) * scale)


@pytest.mark.parametrize("rows", [3, 8, 40])
def test_rows_run_alone_then_together_then_in_a_crowd_then_between_strangers(rows: int) -> None:
    backend = Rule(lambda x: x * 2)
    assert batch_dependence(backend, ROW, ROW.example(rows)) == 0.0
    golden = min(rows, GOLDEN)
    strangers = [golden + 2, golden + 2]  # huge ones, and NaN with infinity
    assert [shape[0] for shape in backend.shapes] == [1] * golden + [golden, COMPANY, *strangers]


def test_the_largest_change_counts_relative_to_the_largest_output() -> None:
    backend = Rule(lambda x: x + (len(x) >= COMPANY) * 0.5)
    rows = (np.tile(np.array([0, 1, -4], np.float32), (8, 1)),)
    assert batch_dependence(backend, ROW, rows) == pytest.approx(0.5 / 4)


def test_one_scale_for_a_whole_batch_shows_by_a_stranger_who_wipes_out_all_others() -> None:
    rows = (np.linspace(0.9, 1, 24, dtype=np.float32).reshape(8, 3),)
    assert batch_dependence(Rule(one_scale), ROW, rows) == RUINED, "scaled by infinity nothing is a number any more"
    assert batch_dependence(Rule(lambda x: one_scale(np.nan_to_num(x, posinf=1e9))), ROW, rows) == pytest.approx(1)


def test_each_row_by_its_own_scale_does_not_depend_on_strangers() -> None:
    per_row = Rule(lambda x: np.stack([one_scale(row) for row in x]))
    with np.errstate(invalid="ignore"):
        assert batch_dependence(per_row, ROW, ROW.example(8)) == 0.0


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_only_one_kind_of_stranger_does_shows(poison: float) -> None:
    def infected(x: Array) -> Array:
        return x + 0.5 * np.any((x == poison) | (np.isnan(x) & np.isnan(poison)))

    rows = (np.full((8, 3), 2, np.float32),)
    assert batch_dependence(Rule(infected), ROW, rows) == pytest.approx(0.25)


def test_a_batch_that_the_model_refuses_costs_nobody_an_answer() -> None:
    def strict(x: Array) -> Array:
        if not np.isfinite(x).all():
            raise ValueError("only finite numbers, please")
        return x

    assert batch_dependence(Rule(strict), ROW, ROW.example(8)) == 0.0


def test_answers_of_minus_infinity_may_stay_what_they_are() -> None:
    def masked(x: Array) -> Array:
        return np.where(np.isfinite(x) & (x > 0), x, -np.inf)

    assert batch_dependence(Rule(masked), ROW, ROW.example(8)) == 0.0


def test_every_output_counts_relative_to_its_own_size() -> None:
    class Two(Rule):
        def run(self, batch: Arrays) -> Result:
            (x,) = batch
            return Result((x * 1e6, x + (len(x) >= COMPANY) * 0.5))

    rows = (np.tile(np.array([0, 1, -4], np.float32), (8, 1)),)
    assert batch_dependence(Two(lambda x: x), ROW, rows) == pytest.approx(0.5 / 4)


def test_token_ids_are_those_that_the_model_has() -> None:
    seen: set[int] = set()

    def ids_only(ids: Array, mask: Array) -> Array:
        seen.update(ids[mask == 1].tolist())
        return np.asarray((ids * mask).sum(1, keepdims=True))

    fields = (TensorSpec("ids", "int64", (None,), values=(0, 99)), TensorSpec("mask", "int64", (None,)))
    rows = (np.full((8, 10), 3, np.int64), np.ones((8, 10), np.int64))
    assert batch_dependence(Rule(ids_only), ModelSpec(fields, TOKENS.outputs), rows) == 0.0
    assert max(seen) > 50, "the strangers are others than the rows that are given"
    assert seen <= set(range(100))


def test_rows_that_fill_up_a_compiled_batch_are_company_too() -> None:
    backend = Rule(lambda x: x + 0.5 * (~x.any(axis=1)).any())
    backend.row_buckets = (1, 16, 64)
    rows = (np.full((8, 3), 2, np.float32),)
    assert batch_dependence(backend, ROW, rows) == pytest.approx(0.25)
    assert {shape[0] for shape in backend.shapes} == {1, 16, 64}


def test_rows_of_equal_length_have_company_of_that_length_and_lone_rows_none() -> None:
    leaking = Rule(lambda ids, _: np.asarray(ids.mean(1, keepdims=True)))
    rows = (np.ones((8, 10), np.int64), np.ones((8, 10), np.int64))
    assert batch_dependence(leaking, replace(TOKENS, rows="one_length"), rows) == 0.0
    assert {shape[1] for shape in leaking.shapes} == {10}
    mixing = Rule(lambda x: x - x.mean(0))
    assert batch_dependence(mixing, replace(ROW, rows="one"), ROW.example(8)) == 0.0
    assert batch_dependence(mixing, ROW, ROW.example(8)) > 0.5


def test_shorter_rows_are_padded_in_company_with_the_pad_of_their_field() -> None:
    seen: list[int] = []

    def masked_sum(ids: Array, mask: Array) -> Array:
        seen.extend(ids[mask == 0].tolist())
        return np.asarray((ids * mask).sum(1, keepdims=True))

    rows = (np.ones((8, 10), np.int64), np.ones((8, 10), np.int64))
    backend = Rule(masked_sum)
    assert batch_dependence(backend, TOKENS, rows) == 0.0
    assert [shape[1] for shape in backend.shapes] == [6, 7, 7, 8, 9, 9, 10, 10, 10, 10, 10]
    assert seen
    assert set(seen) == {7}


def test_padding_that_leaks_into_the_answer_shows() -> None:
    rows = (np.ones((8, 10), np.int64), np.ones((8, 10), np.int64))
    leaking = Rule(lambda ids, mask: np.asarray(ids.sum(1, keepdims=True)))
    assert batch_dependence(leaking, TOKENS, rows) == pytest.approx(4 * 7 / 10)


def test_answers_at_padded_positions_are_left_out() -> None:
    backend = Rule(lambda ids, _: ids.astype(np.float32))
    per_token = ModelSpec(TOKENS.inputs, (TensorSpec("y", "float32", (None,)),))
    assert batch_dependence(backend, per_token, (np.ones((8, 10), np.int64),) * 2) == 0.0


def test_every_output_counts_relative_to_its_own_largest_value() -> None:
    spec = ModelSpec(ROW.inputs, (*ROW.outputs, TensorSpec("z", "float32", (3,)), TensorSpec("n", "int64", ())))
    second = Rule(lambda x: (x * 1000, x + (len(x) >= COMPANY) * 0.5, np.arange(len(x)) * 0))
    rows = (np.tile(np.array([0, 1, -4], np.float32), (8, 1)),)
    assert batch_dependence(second, spec, rows) == pytest.approx(0.5 / 4)


def test_what_is_not_finite_depends_where_it_changes() -> None:
    masked = Rule(lambda x: np.where(x > 0, x, -np.inf))
    rows = (np.tile(np.array([0, 1, -4], np.float32), (8, 1)),)
    assert batch_dependence(masked, ROW, rows) == 0.0
    lost = Rule(lambda x: x * (np.nan if len(x) >= COMPANY else 1))
    assert batch_dependence(lost, ROW, rows) == RUINED


def test_outputs_of_zero_are_no_division_by_zero() -> None:
    assert batch_dependence(Rule(lambda x: x * 0), ROW, ROW.example(8)) == 0.0


def test_infinities_count_only_where_company_changes_them() -> None:
    def masked(x: Array) -> Array:
        return np.where(np.arange(3) == 0, -np.inf, x + (len(x) >= COMPANY) * 0.5)

    rows = (np.tile(np.array([0, 1, -4], np.float32), (8, 1)),)
    assert batch_dependence(Rule(masked), ROW, rows) == pytest.approx(0.5 / 4)
    overflowing = Rule(lambda x: x + (np.inf if len(x) >= COMPANY else 0))
    assert 1 <= batch_dependence(overflowing, ROW, rows) < np.inf


@pytest.mark.parametrize(
    ("gate", "dependence", "passes"),
    [
        ({}, 0.02, True),
        ({}, 0.021, False),
        ({"max_drop": 0.1}, 1, False),
        ({"max_batch_dependence": None}, RUINED, True),
        ({"max_batch_dependence": 0.5}, 0.4, True),
        ({"max_batch_dependence": 0}, 1e-9, False),
    ],
)
def test_the_gate_limits_it_even_where_the_config_says_nothing(
    gate: dict[str, float | None], dependence: float, *, passes: bool
) -> None:
    quality = artifact("quantize_dynamic").quality.model_copy(update={"batch_dependence": dependence})
    reason = judged(GateConfig.model_validate(gate), quality, quality).reason
    assert passes == (reason is None)
    assert passes or re.search(
        rf"changes by {dependence:.3g} of the largest .* gate\.max_batch_dependence allows", str(reason)
    )


@pytest.mark.parametrize("most", [1, 2, 5, 8])
def test_no_batch_is_larger_than_there_is_memory_for(most: int) -> None:
    backend = Rule(lambda x: x * (1 + (len(x) > 1)))
    assert batch_dependence(backend, ROW, ROW.example(40), most) == (0.0 if most == 1 else pytest.approx(1.0))
    assert max((shape[0] for shape in backend.shapes), default=0) == (0 if most == 1 else most)
