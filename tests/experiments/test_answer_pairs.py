"""Answers are compared by what they mean; sums of comparisons may be added up in any order, and stored."""

from __future__ import annotations

import json
import math
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from leanserve.comparison import UNLIKE
from leanserve.contracts import Array, Meaning, TensorSpec
from leanserve.experiments.answer_pairs import (
    MOST_CLASSES,
    Agreed,
    AgreementRule,
    AnswerPairs,
    OutputPairs,
    PairedRows,
    pair_answers,
    row_differences,
    weakest_slices,
)
from leanserve.experiments.disagreements import Disagreement, DisagreementRing, row_details

NAN, INF = math.nan, math.inf
RULE = AgreementRule()
LOGITS = TensorSpec("logits", "float32", (4,), meaning="logits")
EMBEDDING = TensorSpec("embedding", "float32", (3,), meaning="embedding")
VALUES = TensorSpec("values", "float32", (2,))
FIELDS = (LOGITS, EMBEDDING, VALUES)


def array(*rows: list[float]) -> Array:
    return np.array(rows, np.float32)


def test_classes_agree_by_the_best_one() -> None:
    theirs = array([3, 2, 1, 0], [0, 1, 2, 3], [0, 1, 2, 3])
    ours = array([3, 2, 1, 0], [3, 1, 2, 0], [NAN, 1, 2, 3])
    found = row_differences(ours, theirs, LOGITS, RULE)
    assert found.agreed.tolist() == [True, False, False]
    assert found.broken.tolist() == [False, False, True]
    assert found.classes == ("0", "3", "3")
    assert found.max_abs.tolist() == [0, 3, UNLIKE]
    assert found.overlap.tolist()[:2] == [1.0, 0.5]
    shares = [np.exp(row) / np.exp(row).sum() for row in (theirs[1], ours[1])]
    assert found.kl[0] == 0
    assert found.kl[1] == pytest.approx(float((shares[0] * np.log(shares[0] / shares[1])).sum()), rel=1e-5)
    assert math.isnan(found.kl[2])


def test_an_equally_masked_class_is_no_difference() -> None:
    found = row_differences(array([1, -INF, 0, 0]), array([1, -INF, 0, 0]), LOGITS, RULE)
    assert (found.agreed[0], found.broken[0], found.max_abs[0], found.kl[0]) == (True, False, 0.0, 0.0)


def test_a_row_of_which_all_is_masked_has_no_divergence() -> None:
    found = row_differences(array([-INF] * 4, [-INF] * 4), array([-INF] * 4, [3, 2, 1, 0]), LOGITS, RULE)
    assert np.isnan(found.kl).all()
    assert found.agreed.tolist() == [True, False]
    assert found.broken.tolist() == [False, True]


def test_an_answer_that_the_base_cannot_give_either_is_not_broken() -> None:
    found = row_differences(array([NAN, 1, 2, 3], [0, 1, 2, 3]), array([NAN, 1, 2, 3], [NAN, 1, 2, 3]), LOGITS, RULE)
    assert found.broken.tolist() == [False, False]
    assert found.agreed.tolist() == [True, False]


def test_independent_classes_agree_if_all_do() -> None:
    field = TensorSpec("tags", "float32", (3,), meaning="independent_probabilities")
    found = row_differences(
        array([0.9, 0.6, 0.1], [0.9, 0.4, 0.1]), array([0.8, 0.7, 0.2], [0.8, 0.7, 0.2]), field, RULE
    )
    assert found.agreed.tolist() == [True, False]
    assert (found.kl > 0).all()


def test_embeddings_agree_by_their_angle_and_overlap_by_their_neighbours() -> None:
    theirs = array([1, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0.9, 0.1])
    found = row_differences(theirs * 2, theirs, EMBEDDING, RULE)
    assert found.agreed.all()
    np.testing.assert_allclose(found.cosine, 1.0, rtol=1e-6)
    assert found.overlap.tolist() == [1.0] * 4
    turned = row_differences(theirs[[2, 1, 0, 3]], theirs, EMBEDDING, RULE)
    assert turned.agreed.tolist() == [False, True, False, True]
    assert turned.overlap.tolist() == [0.0] * 4
    assert np.isnan(row_differences(theirs[:2], theirs[:2], EMBEDDING, RULE).overlap).all()


def test_values_agree_within_their_scale() -> None:
    theirs, ours = array([10.0, 0.0], [10.0, 0.0]), array([10.4, 0.0], [10.0, 0.6])
    assert row_differences(ours, theirs, VALUES, RULE).agreed.tolist() == [True, False]
    wide = AgreementRule(scales={"values": 20.0})
    assert row_differences(ours, theirs, VALUES, wide).agreed.tolist() == [True, True]


@pytest.mark.parametrize(("meaning", "axis"), [("classes_first", 1), ("classes_last", 3)])
def test_maps_of_classes_agree_by_their_share_of_equal_places(meaning: Meaning, axis: int) -> None:
    theirs = np.eye(3)[np.zeros((2, 10, 10), int)]
    ours = theirs.copy()
    ours[0, 0, :2], ours[1, 0, :3] = np.eye(3)[1], np.eye(3)[2]
    ours, theirs = (np.moveaxis(array, 3, axis) for array in (ours, theirs))
    found = row_differences(ours, theirs, TensorSpec("mask", "float64", theirs.shape[1:], meaning=meaning), RULE)
    assert found.agreed.tolist() == [True, False]
    assert found.overlap.tolist() == [0.98, 0.97]


def test_whole_numbers_agree_only_if_they_are_equal() -> None:
    field = TensorSpec("index", "int64", ())
    found = row_differences(np.array([7, 8]), np.array([7, 9]), field, RULE)
    assert found.agreed.tolist() == [True, False]


def test_a_row_agrees_if_all_outputs_do() -> None:
    theirs = (array([1, 0, 0, 0], [0, 1, 0, 0]), array([1, 0, 0], [0, 1, 0]), array([1, 1], [1, 1]))
    ours = (theirs[0], array([1, 0, 0], [1, 0, 0]), theirs[2])
    paired = pair_answers(ours, theirs, FIELDS, RULE, lengths=(3, 17))
    assert (paired.sums.rows, paired.sums.agreed, paired.disagreed) == (2, 1, (1,))
    assert {name: item.agreed for name, item in paired.sums.outputs.items()} == {
        "logits": 2,
        "embedding": 1,
        "values": 2,
    }
    assert paired.sums.lengths == {"<= 4": Agreed(1, 1), "<= 32": Agreed(1, 0)}
    assert paired.sums.outputs["logits"].classes == {"0": Agreed(1, 1), "1": Agreed(1, 1)}


def test_classes_beyond_the_bound_are_counted_together() -> None:
    field = TensorSpec("logits", "float32", (MOST_CLASSES * 2,), meaning="logits")
    answers = np.eye(MOST_CLASSES * 2, dtype=np.float32)
    classes = pair_answers((answers,), (answers,), (field,), RULE).sums.outputs["logits"].classes
    assert len(classes) == MOST_CLASSES + 1
    assert classes["other"] == Agreed(MOST_CLASSES, MOST_CLASSES)


def batch(seed: int, rows: int) -> PairedRows:
    random = np.random.default_rng(seed)
    theirs = tuple(
        random.standard_normal((rows, *(size or 1 for size in field.shape))).astype(np.float32) for field in FIELDS
    )
    ours = tuple(np.where(random.random(item.shape) < 0.02, NAN, item * 1.01) for item in theirs)
    return pair_answers(ours, theirs, FIELDS, RULE, lengths=random.integers(1, 100, rows).tolist())


def same(one: AnswerPairs, other: AnswerPairs) -> bool:
    counts = [
        (
            item.rows,
            item.agreed,
            item.broken,
            item.lengths,
            {name: counted(each) for name, each in item.outputs.items()},
        )
        for item in (one, other)
    ]
    means = [
        [value for each in item.outputs.values() for value in (each.kl.mean, each.cosine.mean)] for item in (one, other)
    ]
    return counts[0] == counts[1] and np.allclose(means[0], means[1])


def counted(item: OutputPairs) -> tuple[object, ...]:
    return item.rows, item.agreed, item.broken, item.max_abs, item.classes, item.kl.count


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 8)), min_size=1, max_size=6), st.randoms())
def test_sums_add_up_in_any_order_and_survive_json(drawn: list[tuple[int, int]], random: object) -> None:
    parts = [batch(*each).sums for each in drawn]
    whole = reduce(AnswerPairs.merged, parts, AnswerPairs())
    assert same(reduce(AnswerPairs.merged, reversed(parts), AnswerPairs()), whole)
    middle = len(parts) // 2
    halves = (reduce(AnswerPairs.merged, half, AnswerPairs()) for half in (parts[:middle], parts[middle:]))
    assert same(AnswerPairs.merged(*halves), whole)
    assert AnswerPairs.from_json(json.loads(json.dumps(whole.to_json(), allow_nan=False))) == whole


@given(
    arrays(np.float32, (3, 4), elements=st.floats(width=32)), arrays(np.float32, (3, 4), elements=st.floats(width=32))
)
@pytest.mark.parametrize("meaning", ["logits", "embedding", "values"])
def test_any_numbers_can_be_compared(meaning: str, ours: Array, theirs: Array) -> None:
    field = TensorSpec("any", "float32", (4,), meaning=meaning)  # type: ignore[arg-type]
    paired = pair_answers((ours,), (theirs,), (field,), RULE)
    assert (paired.sums.agreed + len(paired.disagreed), paired.sums.rows) == (3, 3)
    json.dumps(paired.sums.to_json(), allow_nan=False)
    assert pair_answers((theirs,), (theirs,), (field,), RULE).sums.agreed == 3


def test_the_weakest_slice_comes_first() -> None:
    slices = {"a": Agreed(1000, 999), "b": Agreed(1000, 900), "c": Agreed(2, 1), "d": Agreed()}
    found = weakest_slices(slices, 0.05)
    assert [name for name, _, _ in found] == ["b", "c", "a"]
    assert found[0][2].low < 0.9 < found[0][2].high < found[2][2].low
    assert weakest_slices({}, 0.05) == []


def disagreement(row: int, payload: bytes | None = b"12345") -> Disagreement:
    return Disagreement(at=1.0, request="r", row=row, outputs={}, payload=payload)


def test_the_ring_keeps_the_newest_and_no_payload_unless_asked() -> None:
    ring = DisagreementRing(size=3)
    for row in range(5):
        ring.add(disagreement(row))
    assert [(item.row, item.payload) for item in ring] == [(4, None), (3, None), (2, None)]
    assert len(ring) == 3


def test_payloads_are_bounded_in_all() -> None:
    ring = DisagreementRing(size=4, payload_bytes=12)
    for row in range(6):
        ring.add(disagreement(row))
    assert [item.payload for item in ring] == [b"12345", b"12345", None, None]
    ring.add(disagreement(6, payload=b"x" * 13))
    assert [item.payload for item in ring] == [None, b"12345", b"12345", None]


def test_a_described_row_is_plain_json() -> None:
    paired = batch(1, 4)
    told = json.loads(json.dumps(row_details(paired.found, 0), allow_nan=False))
    assert set(told) == {"logits", "embedding", "values"}
    assert {"agreed", "broken", "max_abs", "class", "overlap"} <= set(told["logits"])
    assert "kl" not in told["values"]
