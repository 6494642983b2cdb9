"""Verdicts: the right one for the right reason, within the requests that were foreseen, and no false alarms."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from pydantic import ValidationError

from leanserve.experiments.evidence import LiveEvidence
from leanserve.experiments.foresight import Traffic, requests_before_start, requests_to_decision, smallest_amount
from leanserve.experiments.self_check import self_check
from leanserve.experiments.verdict import Judgement, Limits, judge
from simulated_traffic import Candidate, arm, traffic

LIMITS = Limits()


def run(seed: int, candidate: Candidate, limits: Limits = LIMITS, step: int = 50, most: int = 20_000) -> Judgement:
    """Look at the evidence every `step` requests until it decides."""
    random, evidence = np.random.default_rng(seed), LiveEvidence()
    while True:
        evidence = evidence.merged(traffic(random, step, candidate))
        verdict = judge(evidence, limits)
        if verdict.state != "keep_looking" or evidence.requests >= most:
            return verdict


def failed(verdict: Judgement) -> list[str]:
    return [item.question for item in verdict.findings if item.answer == "failed"]


@pytest.mark.parametrize(
    ("candidate", "question", "most"),
    [
        (Candidate(agreement=0.94), "agreement", 400),
        (Candidate(failures=0.1), "failures", 400),
        (Candidate(broken=0.02), "broken answers", 400),
        (Candidate(slowdown=1.5), "p95 service time", 1200),
    ],
)
def test_a_worse_candidate_is_rejected_for_the_right_reason(candidate: Candidate, question: str, most: int) -> None:
    verdicts = [run(seed, candidate) for seed in range(10)]
    assert {verdict.state for verdict in verdicts} == {"reject"}
    assert [failed(verdict) for verdict in verdicts].count([question]) >= 9
    assert all(verdict.reason.startswith(question) for verdict in verdicts if failed(verdict) == [question])
    assert np.median([verdict.requests for verdict in verdicts]) <= most


def test_an_equal_candidate_is_promoted_within_the_requests_foreseen() -> None:
    """1,960 service times per arm are predicted for a margin of 10 %; half of the requests go to each."""
    verdicts = [run(seed, Candidate(agreement=0.995)) for seed in range(10)]
    assert {verdict.state for verdict in verdicts} == {"promote"}
    needed = float(np.median([verdict.requests for verdict in verdicts]))
    assert needed <= 2 * 1960 * 1.15
    service_s = arm(np.random.default_rng(0), 20_000, Candidate()).service_s
    foreseen = requests_before_start(LIMITS, Traffic(0.5, 1.0), service_s, agreement=0.995)
    assert foreseen["agreement"] == pytest.approx(343, rel=0.15)
    assert needed == pytest.approx(max(value for value in foreseen.values() if value), rel=0.3)


@pytest.mark.parametrize(
    "candidate", [Candidate(agreement=0.98), Candidate(failures=0.01), Candidate(slowdown=1.1)], ids=repr
)
def test_a_candidate_at_a_limit_is_seldom_promoted(candidate: Candidate) -> None:
    """Each at its own boundary, everything else perfect: alpha and three standard errors of 200 runs."""
    verdicts = [run(seed, candidate, step=1000, most=4000) for seed in range(200)]
    assert [verdict.state for verdict in verdicts].count("promote") / 200 <= 0.097


def test_a_candidate_within_all_limits_is_seldom_rejected() -> None:
    candidate = Candidate(agreement=0.985, failures=0.005, slowdown=1.05)
    verdicts = [run(seed, candidate, step=1000, most=3000) for seed in range(200)]
    assert [verdict.state for verdict in verdicts].count("reject") / 200 <= 0.05


def test_equal_halves_of_the_base_seldom_look_different() -> None:
    alarms = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        one, other = arm(random, 50, Candidate()), arm(random, 50, Candidate())
        looks = []
        for _ in range(6):
            one, other = (half.merged(arm(random, 200, Candidate(failures=0.002))) for half in (one, other))
            looks.append(bool(self_check(one, other, LIMITS, agreed=one.requests, rows=one.requests)))
        alarms += any(looks)
    assert alarms / 200 <= 0.05


def test_unequal_halves_are_told_and_nothing_is_promoted() -> None:
    random = np.random.default_rng(0)
    one, other = arm(random, 2000, Candidate()), arm(random, 2000, Candidate(slowdown=1.5, failures=0.05))
    problems = self_check(one, other, LIMITS, agreed=900, rows=1000)
    assert [problem.partition(" of ")[0] for problem in problems[:3]] == [
        "failures",
        "p95 service time",
        "cost per row",
    ]
    assert problems[3] == "the base agrees with itself in only 900 of 1,000 rows"
    good = traffic(random, 20_000, Candidate())
    assert judge(good, LIMITS).state == "promote"
    stopped = judge(good, LIMITS, problems=problems)
    assert stopped.state == "inconclusive"
    assert "do not look equal" in stopped.reason
    bad = traffic(random, 2000, Candidate(agreement=0.8))
    assert judge(bad, LIMITS, problems=problems).state == "reject"


def test_a_budget_makes_it_inconclusive_and_says_what_is_open() -> None:
    evidence = traffic(np.random.default_rng(1), 600, Candidate())
    assert judge(evidence, LIMITS).state == "keep_looking"
    verdict = judge(evidence, Limits(max_requests=600))
    assert verdict.state == "inconclusive"
    assert "p95 service time" in verdict.reason


def test_too_few_requests_are_said_to_be_too_few() -> None:
    nothing = judge(LiveEvidence(), LIMITS)
    assert nothing.state == "keep_looking"
    assert "too few requests yet" in nothing.reason
    assert all(math.isnan(item.effect) for item in nothing.findings)


def test_cost_decides_only_if_it_is_asked() -> None:
    evidence = traffic(np.random.default_rng(2), 20_000, Candidate(slowdown=1.05))
    assert judge(evidence, LIMITS).state == "promote"
    verdict = judge(evidence, Limits(max_cost_ratio=0.9))
    assert failed(verdict) == ["cost per row"]
    assert verdict.findings[-1].effect == pytest.approx(1.05, rel=0.02)
    assert verdict.findings[-1].interval.low < 1.05 < verdict.findings[-1].interval.high
    cheap = traffic(np.random.default_rng(2), 20_000, Candidate(slowdown=0.8))
    assert judge(cheap, Limits(max_cost_ratio=0.9)).state == "promote"


def test_a_decision_is_foreseen_while_it_is_looked_for() -> None:
    random = np.random.default_rng(3)
    evidence = traffic(random, 600, Candidate())
    foreseen = requests_to_decision(evidence, Limits(max_requests=600))
    assert foreseen is not None
    assert 600 < foreseen < 2 * 1960 * 1.3
    assert judge(evidence.scaled(foreseen / evidence.requests), LIMITS).state == "promote"
    assert requests_to_decision(LiveEvidence(), LIMITS) is None


def test_what_more_traffic_does_not_decide_is_not_foreseen() -> None:
    unseen = LiveEvidence(base=arm(np.random.default_rng(4), 100, Candidate()))
    assert requests_to_decision(unseen, LIMITS) is None
    foreseen = requests_before_start(LIMITS, Traffic(0.0, 0.0), unseen.base.service_s)
    assert foreseen == {"agreement": None, "failures": None, "p95 service time": None}


def test_the_smallest_amount_is_found() -> None:
    assert smallest_amount(lambda amount: amount >= 37, 1, 1000) == pytest.approx(37, rel=0.02)
    assert smallest_amount(lambda amount: amount >= 1, 1, 1000) == 1
    assert smallest_amount(lambda amount: amount >= 999, 1, 1000) == pytest.approx(1000, rel=0.02)
    assert smallest_amount(lambda amount: amount >= 1001, 1, 1000) is None


def test_evidence_of_processes_adds_up_and_survives_json() -> None:
    random = np.random.default_rng(5)
    parts = [traffic(random, 300, Candidate(failures=0.01)) for _ in range(3)]
    whole = parts[0].merged(parts[1]).merged(parts[2])
    other = LiveEvidence.from_json(json.loads(json.dumps(parts[2].to_json(), allow_nan=False))).merged(
        parts[1].merged(parts[0])
    )
    one, two = judge(whole, LIMITS), judge(other, LIMITS)
    assert [item[:3] for item in one.findings] == [item[:3] for item in two.findings]
    assert one.state == two.state
    assert whole.requests == 900


@pytest.mark.parametrize("wrong", [{"min_agreement": 1.0}, {"alpha": 0.0}, {"max_slowdown": 0}, {"agreement": 0.9}])
def test_limits_that_cannot_be_kept_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Limits.model_validate(wrong)
