"""The ramp: steps as the evidence allows, back as soon as it does not, and a state that survives a restart."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from leanserve.experiments.answer_pairs import AnswerPairs
from leanserve.experiments.evidence import LiveEvidence
from leanserve.experiments.ramp import ExperimentEnded, RampPolicy, RampState, Rules, aborted, advance, promoted
from leanserve.experiments.verdict import Limits
from simulated_traffic import Candidate, traffic

RULES = Rules(Limits(), RampPolicy())
PER_SECOND = 50


def ramp(seed: int, candidate: Candidate, rules: Rules = RULES, most_s: int = 1800) -> list[RampState]:
    """Every state of an experiment at 50 requests per second, all of them shadowed, looked at every other second."""
    random, evidence = np.random.default_rng(seed), LiveEvidence()
    states = [RampState.start(rules.policy, 0.0)]
    for now in range(2, most_s, 2):
        evidence = evidence.merged(traffic(random, 2 * PER_SECOND, candidate, states[-1].share))
        state, _ = advance(states[-1], evidence, rules, float(now))
        if state is not states[-1]:
            states.append(state)
        if state.status != "ramping":
            break
    return states


def test_an_equal_candidate_gets_more_traffic_step_by_step_until_it_has_all() -> None:
    states = ramp(0, Candidate(agreement=0.998))
    assert [state.share for state in states] == [0.01, 0.05, 0.25, 0.5, 1.0]
    assert states[-1].status == "promoted"
    moves = np.diff([state.moved_at for state in states])
    assert (moves >= RULES.policy.min_stage_s).all()
    assert all("agreement" in state.reason for state in states[1:])


@pytest.mark.parametrize(
    ("candidate", "reason", "most_s"),
    [
        (Candidate(agreement=0.8), "agreement", 4),
        (Candidate(broken=0.05), "broken answers", 6),
        (Candidate(failures=1.0), "failures", 20),
    ],
)
def test_a_bad_candidate_is_rolled_back_within_seconds(candidate: Candidate, reason: str, most_s: int) -> None:
    last = [ramp(seed, candidate)[-1] for seed in range(10)]
    assert {(state.status, state.share) for state in last} == {("rolled_back", 0.0)}
    assert all(reason in state.reason for state in last)
    assert np.median([state.moved_at for state in last]) <= most_s


def test_a_slow_candidate_is_rolled_back_before_it_gets_half_of_the_traffic() -> None:
    states = ramp(1, Candidate(slowdown=1.6))
    assert states[-1].status == "rolled_back"
    assert "service time" in states[-1].reason
    assert max(state.share for state in states) <= 0.05


def test_a_bad_candidate_gets_beyond_a_step_with_the_chance_of_its_level() -> None:
    """At the limit of agreement; everything else is known to be good."""
    random, streams, limit = np.random.default_rng(2), 60, 0.98
    rules = Rules(Limits(min_agreement=limit), RampPolicy(min_stage_s=0.0))
    good = traffic(random, 40_000, Candidate())
    reached = np.zeros(streams, int)
    for stream in range(streams):
        state, pairs = RampState.start(rules.policy, 0.0), replace(good.pairs, rows=0, agreed=0, broken=0)
        for now in range(8):
            pairs = pairs.merged(AnswerPairs(250, int(random.binomial(250, limit))))
            state, _ = advance(state, replace(good, pairs=pairs), rules, float(now))
        reached[stream] = state.stage if state.status == "ramping" else 4 * (state.status == "promoted")
    for stage in range(1, 5):
        level = rules.policy.level(stage, rules.limits.alpha)
        assert (reached >= stage).mean() <= level + 3 * np.sqrt(level * (1 - level) / streams)


def test_levels_grow_stronger_by_the_same_factor() -> None:
    levels = [RULES.policy.level(stage, 0.05) for stage in range(1, 5)]
    assert levels == pytest.approx([0.473, 0.2236, 0.1057, 0.05], rel=0.01)
    assert RampPolicy(stages=(0.5, 1.0)).level(1, 0.05) == 0.05
    assert max(RampPolicy(stages=tuple(share / 10 for share in range(1, 11))).level(1, 0.2), 0.5) == 0.5


def test_a_single_stage_is_a_shadow_until_it_is_promoted() -> None:
    rules = Rules(Limits(), RampPolicy(stages=(1.0,), min_stage_s=0.0))
    state = RampState.start(rules.policy, 0.0)
    assert state.share == 0.0
    good = traffic(np.random.default_rng(3), 20_000, Candidate())
    assert advance(state, LiveEvidence(), rules, 1.0)[0] is state
    assert advance(state, good, rules, 1.0)[0].share == 1.0


@pytest.mark.parametrize(("choice", "status"), [("hold", "ramping"), ("rollback", "rolled_back")])
def test_what_is_inconclusive_is_held_or_rolled_back(choice: str, status: str) -> None:
    rules = Rules(Limits(max_requests=100), RampPolicy.model_validate({"on_inconclusive": choice}))
    evidence = traffic(np.random.default_rng(4), 200, Candidate())
    state, verdict = advance(RampState.start(rules.policy, 0.0), evidence, rules, 100.0)
    assert (state.status, verdict.state) == (status, "inconclusive")


def test_with_a_failing_self_check_nothing_moves_on() -> None:
    good = traffic(np.random.default_rng(5), 20_000, Candidate())
    rules = Rules(Limits(), RampPolicy(on_inconclusive="hold"))
    start = RampState.start(rules.policy, 0.0)
    assert advance(start, good, rules, 100.0, problems=("halves differ",))[0] is start
    assert advance(start, good, rules, 100.0)[0].stage == 1


def test_a_clock_that_was_set_back_starts_the_stage_anew() -> None:
    good = traffic(np.random.default_rng(6), 20_000, Candidate())
    state = replace(RampState.start(RULES.policy, 0.0), moved_at=1e6)
    state, _ = advance(state, good, RULES, 100.0)
    assert (state.stage, state.moved_at) == (0, 100.0)
    assert advance(state, good, RULES, 131.0)[0].stage == 1


def test_somebody_may_promote_or_abort_once() -> None:
    start = RampState.start(RULES.policy, 0.0)
    assert promoted(start, 5.0, "release day") == RampState(0.0, 5.0, 1.0, 0, "promoted", "release day")
    ended = aborted(start, 5.0, "wrong model")
    assert (ended.share, ended.status) == (0.0, "aborted")
    for again in (promoted, aborted):
        with pytest.raises(ExperimentEnded, match=r"aborted: wrong model.*start another"):
            again(ended, 6.0, "once more")
    good = traffic(np.random.default_rng(7), 20_000, Candidate())
    assert advance(ended, good, RULES, 1000.0)[0] is ended


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 50),
    candidate=st.sampled_from([Candidate(), Candidate(agreement=0.9), Candidate(slowdown=1.3)]),
    restarts=st.sets(st.integers(0, 7)),
)
def test_a_restart_changes_nothing(seed: int, candidate: Candidate, restarts: set[int]) -> None:
    rules = Rules(Limits(), RampPolicy(min_stage_s=0.0))
    random = np.random.default_rng(seed)
    parts = [traffic(random, 400, candidate) for _ in range(8)]
    through, again = (RampState.start(rules.policy, 0.0) for _ in range(2))
    evidence, stored = LiveEvidence(), LiveEvidence()
    for now, part in enumerate(parts):
        evidence, stored = evidence.merged(part), stored.merged(part)
        through, _ = advance(through, evidence, rules, float(now))
        again, _ = advance(again, stored, rules, float(now))
        if now in restarts:
            again = RampState.from_json(json.loads(json.dumps(again.to_json())))
            stored = LiveEvidence.from_json(json.loads(json.dumps(stored.to_json())))
        assert again == through


@pytest.mark.parametrize("stages", [[], [0.5], [0.5, 0.25, 1.0], [0.0, 1.0], [0.1, 2.0], [0.5, 0.5, 1.0]])
def test_stages_that_do_not_ascend_to_all_are_refused(stages: list[float]) -> None:
    with pytest.raises(ValidationError):
        RampPolicy.model_validate({"stages": stages})
