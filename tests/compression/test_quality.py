"""Fidelity and what is kept of it, where outputs are infinite: masked logits are -inf, and JSON has no infinities."""

from __future__ import annotations

import math

import numpy as np
import pytest

from service.bases.scores import pair_correlation
from service.compression.quality import fidelity

INF = np.inf
BASE = np.array([[2.0, 1.0, -INF], [0.0, 3.0, -INF]])


def test_masked_logits_are_compared_by_the_classes_that_are_left() -> None:
    given = np.array([[1.0, 2.0, -INF], [0.0, 3.0, -INF]])
    near = fidelity((given,), (BASE,), classes=True)
    p, q = 1 / (1 + math.exp(-1)), 1 / (1 + math.e)
    expected = (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / 2
    assert near["agreement"] == 0.5
    assert near["kl"] == pytest.approx(expected, rel=1e-12)
    assert near["cosine"] == pytest.approx((4 / 5 + 1) / 2)


def test_the_base_is_its_own_like() -> None:
    assert fidelity((BASE,), (BASE,), classes=True) == {
        "agreement": 1.0,
        "kl": 0.0,
        "cosine": 1.0,
        "rank_agreement": None,
    }


@pytest.mark.parametrize("wrong", [np.nan, INF, -INF])
@pytest.mark.parametrize("classes", [True, False])
def test_whatever_a_variant_answers_the_numbers_are_finite(wrong: float, classes: bool) -> None:  # noqa: FBT001
    base = np.random.default_rng(0).standard_normal((4, 3))
    for given in (np.full((4, 3), wrong), np.where(np.eye(4, 3) > 0, wrong, base)):
        for pair in ((given, base), (base, given)):
            near = fidelity((pair[0],), (pair[1],), classes=classes)
            assert all(math.isfinite(value) for value in near.values() if value is not None)
            assert near["cosine"] is not None
            assert near["cosine"] < 0.5


def test_a_class_that_only_the_variant_rules_out_costs_much_and_one_that_is_nan_agrees_with_nothing() -> None:
    base = np.array([[0.0, 0.0]])
    assert (fidelity((np.array([[0.0, -INF]]),), (base,), classes=True)["kl"] or 0) > 300
    assert fidelity((np.array([[np.nan, 0.0]]),), (base,), classes=True)["agreement"] == 0.0


def test_embeddings_with_masked_places_are_scored_by_the_others() -> None:
    pairs = np.array([[1.0, 0.0], [1.0, 0.1], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    masked = np.concatenate([pairs, np.full((6, 1), -INF)], axis=1)
    labels = np.repeat([3.0, 2.0, 1.0], 2)
    assert pair_correlation((masked,), labels) == pair_correlation((pairs,), labels) == pytest.approx(1.0)
