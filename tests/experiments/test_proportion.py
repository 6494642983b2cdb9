"""Evidence about shares: right at every look, as quick as promised, and equal to an independent implementation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import ville
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from leanserve.experiments.proportion import (
    PRIOR,
    log_evidence_above,
    log_evidence_below,
    median_rows,
    share_bounds,
    share_interval,
)

Counts = NDArray[np.int64]
Evidence = Callable[[Counts, Counts, float], NDArray[np.float64]]
ALPHA, LIMIT, STREAMS = 0.05, 0.98, 2000
CROSSING = -math.log(ALPHA)
LOOKS: Counts = np.unique(np.linspace(1, 5000, 300).round()).astype(np.int64)
MOST_CROSSINGS = 0.065
"""Alpha and three standard errors of 2,000 streams."""


def streams(share: float, seed: int, looks: Counts = LOOKS) -> tuple[Counts, Counts]:
    """Good and bad rows of random streams [streams, looks]."""
    random = np.random.default_rng(seed)
    good = random.binomial(np.diff(looks, prepend=0), share, (STREAMS, len(looks))).cumsum(axis=1)
    return good, looks - good


@pytest.mark.parametrize("limit", [0.9, 0.98, 0.999])
@pytest.mark.parametrize("evidence", [log_evidence_above, log_evidence_below])
def test_a_share_at_its_limit_is_seldom_ever_said_to_be_beyond(evidence: Evidence, limit: float) -> None:
    crossed = (evidence(*streams(limit, seed=1), limit) >= CROSSING).any(axis=1).mean()
    assert crossed <= MOST_CROSSINGS


def test_looking_at_every_row_is_no_worse() -> None:
    good, bad = streams(LIMIT, 2, np.arange(1, 1001, dtype=np.int64))
    for evidence in (log_evidence_above, log_evidence_below):
        assert (evidence(good, bad, LIMIT) >= CROSSING).any(axis=1).mean() <= MOST_CROSSINGS


@pytest.mark.parametrize(
    ("share", "least", "most"),
    [(1.0, 217, 217), (0.995, 343, 343), (0.99, 1000, 1000), (0.95, 200, 281), (0.97, 1700, 2800)],
)
def test_the_rows_to_a_decision_are_those_that_were_predicted(share: float, least: float, most: float) -> None:
    good, bad = streams(share, 3)
    evidence = log_evidence_above if share > LIMIT else log_evidence_below
    crossed = evidence(good, bad, LIMIT) >= CROSSING
    stops = np.where(crossed.any(axis=1), LOOKS[crossed.argmax(axis=1)], 10**9)
    assert least * 0.85 <= np.median(stops) <= most * 1.15
    foreseen = median_rows(share, LIMIT, ALPHA)
    assert foreseen is not None
    assert least * 0.85 <= foreseen <= most * 1.15


def test_at_the_limit_no_decision_is_foreseen() -> None:
    assert median_rows(LIMIT, LIMIT, 1e-4) is None


def test_the_interval_holds_the_truth_at_all_looks() -> None:
    low, high = share_bounds(*streams(0.97, 4), ALPHA)
    assert ((low > 0.97) | (high < 0.97)).any(axis=1).mean() <= MOST_CROSSINGS


@pytest.mark.parametrize("share", [0.5, 0.97, 1.0])
def test_the_interval_is_that_of_ville(share: float) -> None:
    rows = (np.random.default_rng(5).random(2000) < share).astype(float)
    theirs = ville.BernoulliCS(alpha=ALPHA, prior=PRIOR, intersect=False).fit(rows)
    low, high = share_bounds(rows.cumsum(), (1 - rows).cumsum(), ALPHA)
    np.testing.assert_allclose(low, theirs.lower_, atol=1e-9)
    np.testing.assert_allclose(high, theirs.upper_, atol=1e-9)


def test_the_evidence_of_a_whole_prior_is_that_of_ville() -> None:
    """The two halves of the prior, weighted by its mass on each side, are the untruncated e-value."""
    from scipy.special import betainc

    rows = (np.random.default_rng(6).random(500) < 0.95).astype(float)
    good, bad = rows.cumsum(), (1 - rows).cumsum()
    below = betainc(*PRIOR, LIMIT)
    ours = below * np.exp(log_evidence_below(good, bad, LIMIT)) + (1 - below) * np.exp(
        log_evidence_above(good, bad, LIMIT)
    )
    np.testing.assert_allclose(np.log(ours), ville.BernoulliTest(LIMIT, prior=PRIOR).fit(rows).log_e_values_, atol=1e-9)


@given(st.integers(0, 10**7), st.integers(0, 10**7), st.sampled_from([0.5, 0.9, 0.999]))
def test_one_more_good_row_speaks_for_and_never_against(good: int, bad: int, limit: float) -> None:
    evidence = [log_evidence_above(good + more, bad, limit) for more in (0, 1)]
    assert evidence[0] <= evidence[1] + 1e-6
    assert not np.isnan(evidence).any()
    against = [log_evidence_below(good, bad + more, limit) for more in (0, 1)]
    assert against[0] <= against[1] + 1e-6
    assert not np.isnan(against).any()


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_an_interval_holds_what_was_seen(good: int, bad: int) -> None:
    low, high = share_interval(good, bad, ALPHA)
    assert 0.0 <= low <= high <= 1.0
    if good + bad:
        assert low <= good / (good + bad) <= high


def test_nothing_seen_is_no_evidence_and_leaves_all_open() -> None:
    assert log_evidence_above(0, 0, LIMIT) == pytest.approx(0.0)
    assert share_interval(0, 0, ALPHA) == (0.0, 1.0)
