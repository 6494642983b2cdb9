"""One look at an experiment: where it goes from here, and what there is to tell of it. On a thread beside the loop."""

from __future__ import annotations

import time
from typing import NamedTuple

from leanserve.experiments.answer_pairs import AnswerPairs
from leanserve.experiments.evidence import ArmSums, LiveEvidence
from leanserve.experiments.foresight import requests_to_decision
from leanserve.experiments.ramp import RampState, Rules, advance
from leanserve.experiments.self_check import self_check
from leanserve.experiments.verdict import Judgement


class LookedAt(NamedTuple):
    """What a look takes."""

    state: RampState
    evidence: LiveEvidence
    halves: tuple[ArmSums, ArmSums]
    repeated: AnswerPairs
    rules: Rules
    foresee: bool
    """Whether the requests to a decision are to be found, which takes ten times as long as all else."""


class Look(NamedTuple):
    """What it found: the state from now on (the same one if nothing moves), and why."""

    state: RampState
    judgement: Judgement
    problems: tuple[str, ...]
    foreseen: float | None
    seconds: float


def look(at: LookedAt) -> Look:
    """Judge the evidence."""
    began = time.perf_counter()
    limits = at.rules.limits
    problems = self_check(*at.halves, limits, at.repeated.agreed, at.repeated.rows)
    state, judgement = advance(at.state, at.evidence, at.rules, time.time(), problems)
    foreseen = requests_to_decision(at.evidence, limits) if at.foresee else None
    return Look(state, judgement, problems, foreseen, time.perf_counter() - began)
