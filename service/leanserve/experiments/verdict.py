"""Is the candidate good enough to take over? Several questions, one verdict, at any time and as often as one likes.

Two promises, each at level alpha. A candidate that is beyond a limit is promoted with a probability of at most alpha:
every question has to pass at that level, and a bad candidate fails to at one of them (Berger's intersection-union test,
which needs no correction). A candidate that is within all limits is rejected with a probability of at most alpha: one
question is enough for it, so each has its part of alpha (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from leanserve.experiments.evidence import LiveEvidence
from leanserve.experiments.interval import Interval
from leanserve.experiments.latency_histogram import FINE_SECONDS
from leanserve.experiments.proportion import log_evidence_above, log_evidence_below, share_interval
from leanserve.experiments.quantile import quantile_bounds

BROKEN = "broken answers"
"""The question that may stay open."""

VerdictState = Literal["promote", "reject", "keep_looking", "inconclusive"]
FindingState = Literal["passed", "failed", "open"]


class Limits(BaseModel):
    """What a candidate must keep to be promoted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_agreement: float = Field(default=0.98, gt=0, lt=1)
    """Share of rows that it answers as the base does."""
    max_failures: float = Field(default=0.01, gt=0, lt=1)
    """Share of its requests that it may fail to answer."""
    max_broken: float = Field(default=0.001, gt=0, lt=1)
    """Share of rows that it may answer with NaN or infinity where the base does not. It only rejects: such a row does
    not agree either, which must be shown to be rare anyway."""
    quantile: float = Field(default=0.95, gt=0, lt=1)
    """Of the service time."""
    max_slowdown: float = Field(default=1.1, gt=0)
    """Times the base's service time at that quantile."""
    max_cost_ratio: float | None = Field(default=None, gt=0)
    """Times the base's device seconds per row; `None`: cost is shown, and does not decide."""
    alpha: float = Field(default=0.05, gt=0, le=0.2)
    """Probability of promoting a candidate beyond a limit, and that of rejecting one within all."""
    max_requests: int | None = Field(default=None, gt=0)
    """Requests after which nothing decided is inconclusive; `None`: it goes on."""


class LogEvidence(NamedTuple):
    """How much of the evidence that it takes is there, in logarithms: from 1 on it decides."""

    promote: float
    reject: float


class Finding(NamedTuple):
    """The answer to one question so far."""

    question: str
    answer: FindingState
    effect: float
    """The share or ratio that was seen; NaN without anything seen."""
    interval: Interval
    """It holds the truth at all looks at once with probability 1 - alpha."""
    limit: float
    reason: str
    observations: float = 0.0
    """Rows, requests or batches behind it; of two variants those of the one that has fewer."""
    evidence: LogEvidence | None = None
    """Of a share; a ratio is decided by its interval."""


class Judgement(NamedTuple):
    """A state, why, and what is behind it."""

    state: VerdictState
    reason: str
    findings: tuple[Finding, ...]
    requests: float
    """Requests so far."""


def judge(
    evidence: LiveEvidence, limits: Limits, level: float | None = None, problems: Sequence[str] = ()
) -> Judgement:
    """Decide by what is known now.

    `level` is that of promotion where it is not alpha; `problems` are those of the self-check, with which nothing is
    promoted.
    """
    findings = _findings(evidence, limits, limits.alpha if level is None else level)
    state, reason = _state(findings, evidence.requests, limits, problems)
    return Judgement(state, reason, findings, evidence.requests)


def _findings(evidence: LiveEvidence, limits: Limits, level: float) -> tuple[Finding, ...]:
    reject = limits.alpha / (4 if limits.max_cost_ratio is None else 5)
    levels = _Levels(limits.alpha, level, reject)
    pairs, candidate = evidence.pairs, evidence.candidate
    found = [
        _share_question("agreement", pairs.agreed, pairs.rows, limits.min_agreement, levels),
        _flipped("failures", candidate.failures, candidate.requests, limits.max_failures, levels),
        _flipped(BROKEN, pairs.broken, pairs.rows, limits.max_broken, levels),
        _latency_question(evidence, limits, levels),
    ]
    if limits.max_cost_ratio is not None:
        found.append(_cost_question(evidence, limits.max_cost_ratio, levels))
    return tuple(found)


class _Levels(NamedTuple):
    """Of what is shown, of passing and of failing a question."""

    shown: float
    passing: float
    failing: float


def _share_question(question: str, good: float, rows: float, limit: float, levels: _Levels) -> Finding:
    """Is the share of good rows above the limit?"""
    bad = rows - good
    above = float(log_evidence_above(good, bad, limit)) / -math.log(levels.passing)
    below = float(log_evidence_below(good, bad, limit)) / -math.log(levels.failing)
    answer: FindingState = "passed" if above >= 1 else "failed" if below >= 1 else "open"
    interval = share_interval(good, bad, levels.shown)
    reason = f"{_percent(interval)} of {rows:,.0f} rows, at least {100 * limit:.4g} % is asked for"
    effect, evidence = good / rows if rows else math.nan, LogEvidence(above, below)
    return Finding(question, answer, effect, interval, limit, reason, rows, evidence)


def _flipped(question: str, bad: float, rows: float, limit: float, levels: _Levels) -> Finding:
    """Is the share of bad rows below the limit?"""
    found = _share_question(question, rows - bad, rows, 1 - limit, levels)
    interval = Interval(1 - found.interval.high, 1 - found.interval.low)
    reason = f"{_percent(interval)} of {rows:,.0f}, at most {100 * limit:.4g} % is allowed"
    return found._replace(effect=1 - found.effect, interval=interval, limit=limit, reason=reason)


def _latency_question(evidence: LiveEvidence, limits: Limits, levels: _Levels) -> Finding:
    arms = evidence.base.service_s, evidence.candidate.service_s
    question = f"p{100 * limits.quantile:g} service time"
    wanted = sorted({*levels, levels.shown / 2})
    ends = quantile_bounds(FINE_SECONDS, [arm.counts for arm in arms], limits.quantile, np.array(wanted)[:, None])
    intervals = {
        level: [Interval(*each) for each in zip(*pair, strict=True)] for level, *pair in zip(wanted, *ends, strict=True)
    }
    base, candidate = (arm.quantile(limits.quantile) for arm in arms)
    effect = candidate / base if base and candidate else math.nan
    found = _ratio_question(question, effect, intervals, limits.max_slowdown, levels)
    return found._replace(observations=min(arm.count for arm in arms))


def _cost_question(evidence: LiveEvidence, limit: float, levels: _Levels) -> Finding:
    arms = evidence.base.cost.device_s, evidence.candidate.cost.device_s
    intervals = {level: [arm.interval(level) for arm in arms] for level in {*levels, levels.shown / 2}}
    effect = arms[1].per_row / arms[0].per_row if arms[0].value and arms[1].value else math.nan
    found = _ratio_question("cost per row", effect, intervals, limit, levels)
    return found._replace(observations=min(arm.batches for arm in arms))


def _ratio_question(
    question: str, effect: float, intervals: dict[float, list[Interval]], limit: float, levels: _Levels
) -> Finding:
    """Is the candidate's number at most `limit` times the base's? Of an interval one end counts, at half its level."""
    (base, candidate), (fast_base, slow_candidate) = intervals[levels.passing], intervals[levels.failing]
    within = candidate.high <= limit * base.low
    beyond = slow_candidate.low > limit * fast_base.high
    answer: FindingState = "passed" if within else "failed" if beyond else "open"
    shown = intervals[levels.shown / 2]
    interval = shown[1].over(shown[0])
    reason = f"{interval.low:.3g} to {interval.high:.3g} times the base's, at most {limit:.4g} is allowed"
    if not interval.known:
        reason = f"too few requests yet to bound it; at most {limit:.4g} times the base's is allowed"
    return Finding(question, answer, effect, interval, limit, reason)


def _percent(interval: Interval) -> str:
    return f"{100 * interval.low:.4g} to {100 * interval.high:.4g} %"


def _state(
    findings: Sequence[Finding], requests: float, limits: Limits, problems: Sequence[str]
) -> tuple[VerdictState, str]:
    failed = [item for item in findings if item.answer == "failed"]
    waiting = [item for item in findings if item.answer == "open" and item.question != BROKEN]
    if failed:
        return "reject", "; ".join(f"{item.question}: {item.reason}" for item in failed)
    if problems:
        return "inconclusive", f"two equal variants do not look equal, so nothing is promoted: {'; '.join(problems)}"
    if not waiting:
        return "promote", "; ".join(f"{item.question}: {item.reason}" for item in findings)
    reason = "; ".join(f"{item.question}: {item.reason}" for item in waiting)
    if limits.max_requests is not None and requests >= limits.max_requests:
        return "inconclusive", f"still open after {requests:,.0f} requests: {reason}"
    return "keep_looking", f"still open: {reason}"
