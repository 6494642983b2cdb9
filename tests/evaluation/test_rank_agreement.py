"""Rank agreement: whether an embedding's neighbours stay in order, and where the report shows it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from leanserve.contracts import Array, TensorSpec
from leanserve.evaluation.fidelity import RANKED_ROWS, fidelity, rank_agreement
from leanserve.report.columns import answers, waterfall
from leanserve.report.summary import summarise
from report_samples import NO_CLASSES, UNLABELLED, a_few, changed, classes, values

EMBEDDING = (TensorSpec("embedding", "float64", (8,), meaning="embedding"),)


def rows(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 8))


def test_what_keeps_every_similarity_agrees() -> None:
    base = rows(40)
    turned = np.linalg.qr(rows(8, seed=1))[0]
    lengths = np.random.default_rng(2).uniform(0.5, 2, (40, 1))
    assert rank_agreement(base, base) == 1.0
    assert rank_agreement(lengths * base @ turned, base) == pytest.approx(1.0)
    assert abs(rank_agreement(rows(40, seed=3), base) or 1.0) < 0.2


def test_it_is_the_correlation_of_the_ranks_of_all_pairs() -> None:
    base, other = (
        np.stack([np.cos(angles), np.sin(angles)], axis=1)
        for angles in (np.radians([0, 10, 30, 70]), np.radians([0, 40, 25, 70]))
    )
    # Between pairs 01, 02, 03, 12, 13, 23 there are 10, 30, 70, 20, 60, 40 degrees, and 40, 25, 70, 15, 30, 45.
    ranks, others = [6, 4, 1, 5, 2, 3], [3, 5, 1, 6, 4, 2]
    assert rank_agreement(other, base) == pytest.approx(np.corrcoef(ranks, others)[0, 1])


def test_it_sees_what_the_mean_cosine_does_not() -> None:
    common = 30 * np.ones(8)
    [near] = fidelity((common + rows(40, seed=1),), (common + rows(40),), EMBEDDING)
    assert near.cosine is not None
    assert near.rank_agreement is not None
    assert near.cosine > 0.998
    assert near.rank_agreement < 0.2


def test_of_many_rows_the_first_are_compared() -> None:
    base = rows(RANKED_ROWS + 40)
    changed_later = base.copy()
    changed_later[RANKED_ROWS:] = 0
    assert rank_agreement(changed_later, base) == 1.0


def test_where_there_is_no_order() -> None:
    assert rank_agreement(rows(2), rows(2, seed=1)) is None
    alike = np.ones((5, 8))
    assert rank_agreement(alike, alike) == 1.0
    assert rank_agreement(alike, rows(5)) == 0.0


BOTH = {"outputs": (classes(0.9), values(0.3)), "agreement": 0.7}


@pytest.mark.parametrize(
    ("quality", "titles", "steps"),
    [
        (
            {},
            ["score % [95 % CI]", "drop (≤), pts", "agreement", "worst row", "KL, nats", "mates"],
            ["score % [95 % CI]", "agreement"],
        ),
        (UNLABELLED, ["agreement", "worst row", "KL, nats", "mates"], ["agreement", "ms at 8"]),
        (NO_CLASSES, ["agreement", "worst row", "ranks", "mates"], ["agreement", "ranks"]),
        (
            BOTH,
            ["score % [95 % CI]", "drop (≤), pts", "agreement", "worst row", "KL, nats", "error", "mates"],
            ["score % [95 % CI]", "agreement"],
        ),
    ],
)
def test_the_report_has_columns_for_what_was_measured(
    quality: dict[str, Any], titles: list[str], steps: list[str]
) -> None:
    summary = summarise(changed(a_few(), quality))
    assert [column.title for column in answers(summary.measured)] == titles
    assert [column.title for column in waterfall(summary.measured, summary.batches)][:2] == steps
