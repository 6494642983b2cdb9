"""Scores of bases that bring none: by the output that the labels belong to."""

from __future__ import annotations

import numpy as np
import pytest

from leanserve.contracts import ModelSpec, TensorSpec
from leanserve.scoring import determination, pair_correlation, regressed, score_of

NUMBER = TensorSpec("number", "int64", ())
CHANCES = TensorSpec("chances", "float32", (2,), meaning="probabilities")
PRICE = TensorSpec("price", "float32", (1,))
BOXES = TensorSpec("boxes", "float32", (4,))
VECTOR = TensorSpec("vector", "float32", (4,), meaning="embedding")
RANDOM = np.random.default_rng(0)


def test_accuracy_is_that_of_the_output_that_the_labels_name() -> None:
    score = score_of(ModelSpec((), (NUMBER, CHANCES), ("no", "yes"), labelled=1), 1).function
    assert score((np.array([5, 5]), np.array([[0.9, 0.1], [0.2, 0.8]])), np.array([0, 1])) == 1.0


def test_pairs_are_scored_by_the_embedding() -> None:
    score = score_of(ModelSpec((), (PRICE, VECTOR)), 2).function
    angles = np.radians([0, 10, 0, 50, 0, 30])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert score((np.zeros((6, 1)), vectors), np.array([3, 3, 1, 1, 2, 2])) == pytest.approx(1.0)


def test_a_regression_is_scored_by_what_it_explains() -> None:
    labels = RANDOM.standard_normal((50, 4))
    score = score_of(ModelSpec((), (NUMBER, BOXES, VECTOR)), 1).function
    number, vector = np.zeros(50, int), np.zeros((50, 4))
    assert score((number, labels, vector), labels) == 1.0
    assert score((number, np.broadcast_to(labels.mean(0), labels.shape), vector), labels) == pytest.approx(0.0)
    off = 1.18 * (labels - labels.mean(0)) + labels.mean(0)
    assert score((number, off, vector), labels) == pytest.approx(1 - 0.18**2)
    price = score_of(ModelSpec((), (PRICE,)), 1).function
    assert price((labels[:, :1],), labels[:, 0]) == 1.0, "labels need no axis for a single column"


def test_columns_that_do_not_vary_and_answers_that_are_no_numbers() -> None:
    labels = np.stack([np.ones(9), np.arange(9.0)], axis=1)
    fields = (TensorSpec("y", "float32", (2,)),)
    assert determination((labels,), labels, fields) == 1.0
    assert determination((labels + np.array([0.1, 0]),), labels, fields) == 0.5
    broken = labels.copy()
    broken[3, 1] = np.nan
    assert determination((broken,), labels, fields) == 0.5


def test_labels_belong_to_the_values_of_their_shape() -> None:
    outputs = (NUMBER, PRICE, BOXES, VECTOR, TensorSpec("mask", "float32", (None, 4)))
    assert [regressed(outputs, shape) for shape in ((), (1,), (4,), (2,))] == [[1], [1], [2], []]


def test_embeddings_with_masked_places_are_scored_by_the_others() -> None:
    pairs = np.array([[1.0, 0.0], [1.0, 0.1], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    masked = np.concatenate([pairs, np.full((6, 1), -np.inf)], axis=1)
    labels = np.repeat([3.0, 2.0, 1.0], 2)
    assert pair_correlation((masked,), labels) == pair_correlation((pairs,), labels) == pytest.approx(1.0)
