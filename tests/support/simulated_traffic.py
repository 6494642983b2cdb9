"""Traffic of two variants, drawn at random, for the tests of verdict and ramp."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from leanserve.experiments.answer_pairs import AnswerPairs
from leanserve.experiments.cost import CostSums
from leanserve.experiments.evidence import ArmSums, LiveEvidence
from leanserve.experiments.latency_histogram import FINE_SECONDS, LatencyHistogram
from leanserve.experiments.mean import RatioSums


@dataclass(frozen=True)
class Candidate:
    """How it differs from the base."""

    agreement: float = 1.0
    failures: float = 0.0
    broken: float = 0.0
    slowdown: float = 1.0


def arm(random: np.random.Generator, requests: int, candidate: Candidate) -> ArmSums:
    """Requests of a row each, alone in their batches, of 10 ms, lognormal with sigma 0.3."""
    seconds = candidate.slowdown * 0.01 * np.exp(0.3 * random.standard_normal(requests))
    counts = np.bincount(np.searchsorted(FINE_SECONDS, seconds), minlength=len(FINE_SECONDS) + 1)
    total, squares = float(seconds.sum()), float(np.square(seconds).sum())
    cost = RatioSums(requests, total, requests, squares, total, requests)
    failures = int(random.binomial(requests, candidate.failures))
    return ArmSums(requests, failures, LatencyHistogram(counts.astype(np.float64)), CostSums(cost))


def traffic(
    random: np.random.Generator, requests: int, candidate: Candidate, share: float = 0.5, shadowed: float = 1.0
) -> LiveEvidence:
    """So many more requests, of which the candidate gets `share`; it also answers `shadowed` rows per request."""
    own, rows = int(random.binomial(requests, share)), round(requests * shadowed)
    agreed, broken = int(random.binomial(rows, candidate.agreement)), int(random.binomial(rows, candidate.broken))
    return LiveEvidence(
        arm(random, requests - own, Candidate()), arm(random, own, candidate), AnswerPairs(rows, agreed, broken)
    )
