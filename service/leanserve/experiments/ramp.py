"""How much traffic does a candidate get? Step by step more as the evidence grows; none once it speaks against it.

A step is a promotion at a level of its own: from 1 to 5 % of the traffic the evidence need not be as strong as for all
of it. With alpha = 5 % and four steps the levels are 47, 22, 11 and 5 %: the chance that a bad candidate ever gets
beyond a step falls by the same factor each time. Rejection takes the whole evidence at every look, at full strength.

A pure state machine: time and evidence are handed in, a new state comes out. A state is plain values, so that it
survives a restart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from leanserve.contracts import Json
from leanserve.experiments.evidence import LiveEvidence
from leanserve.experiments.verdict import Judgement, Limits, judge

WEAKEST = 0.5
"""No step is taken at a weaker level."""

RampStatus = Literal["ramping", "promoted", "rolled_back", "aborted"]


class ExperimentEnded(ValueError):
    """Somebody wants to move an experiment that has ended; start another one."""


class RampPolicy(BaseModel):
    """The steps, and when they are taken."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stages: tuple[float, ...] = Field(default=(0.01, 0.05, 0.25, 0.5, 1.0), min_length=1)
    """Shares of the traffic, ascending, the last 1."""
    min_stage_s: float = Field(default=30.0, ge=0)
    """Seconds that each stage lasts at least, so that what only shows after a while has a chance to."""
    on_inconclusive: Literal["hold", "rollback"] = "rollback"

    @field_validator("stages")
    @classmethod
    def _ascend_to_all(cls, stages: tuple[float, ...]) -> tuple[float, ...]:
        if stages[0] <= 0 or stages[-1] != 1 or any(one >= other for one, other in pairwise(stages)):
            raise ValueError(f"stages must ascend from above 0 to 1, and these do not: {list(stages)}")
        return stages

    def level(self, stage: int, alpha: float) -> float:
        """Of the promotion to a stage (from 1): alpha for the last one, and weaker before."""
        return max(alpha, min(WEAKEST, float(alpha ** (stage / (len(self.stages) - 1)))))


@dataclass(frozen=True, slots=True)
class RampState:
    """Where an experiment is. Times are seconds since the epoch."""

    started_at: float
    moved_at: float
    share: float
    """Of the traffic that the candidate gets now."""
    stage: int = 0
    status: RampStatus = "ramping"
    reason: str = "started"
    """Of the last move."""

    @classmethod
    def start(cls, policy: RampPolicy, now: float) -> Self:
        """On the first stage; where there is only one, nothing but a shadow until it is promoted."""
        return cls(now, now, policy.stages[0] if len(policy.stages) > 1 else 0.0)

    def to_json(self) -> Json:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Json]) -> Self:
        """Of what `to_json` made."""
        return cls(**stored)


@dataclass(frozen=True, slots=True)
class Rules:
    """What decides how an experiment goes on."""

    limits: Limits
    policy: RampPolicy


def advance(
    state: RampState, evidence: LiveEvidence, rules: Rules, now: float, problems: Sequence[str] = ()
) -> tuple[RampState, Judgement]:
    """The state after a look at the evidence, the same object if nothing moves, and the verdict behind it.

    `problems` are those of the self-check. An experiment that has ended does not move.
    """
    verdict = judge(evidence, rules.limits, problems=problems)
    if state.status != "ramping":
        return state, verdict
    if verdict.state == "reject":
        return _ended(state, "rolled_back", now, verdict.reason), verdict
    if verdict.state == "inconclusive":
        held = rules.policy.on_inconclusive == "hold"
        return (state if held else _ended(state, "rolled_back", now, verdict.reason)), verdict
    if now < state.moved_at:  # the clock was set back
        return replace(state, moved_at=now), verdict
    if now - state.moved_at < rules.policy.min_stage_s:
        return state, verdict
    return _stepped(state, evidence, rules, now), verdict


def _stepped(state: RampState, evidence: LiveEvidence, rules: Rules, now: float) -> RampState:
    last = len(rules.policy.stages) - 1
    stage = min(state.stage + 1, last)
    level = rules.policy.level(stage, rules.limits.alpha) if last else rules.limits.alpha
    allowed = judge(evidence, rules.limits, level)
    if allowed.state != "promote":
        return state
    if stage == last:
        return _ended(state, "promoted", now, allowed.reason)
    return replace(state, moved_at=now, stage=stage, share=rules.policy.stages[stage], reason=allowed.reason)


def promoted(state: RampState, now: float, reason: str) -> RampState:
    """All traffic goes to the candidate, because somebody says so. Raises `ExperimentEnded`."""
    return _ended(_running(state), "promoted", now, reason)


def aborted(state: RampState, now: float, reason: str) -> RampState:
    """No traffic goes to the candidate any more, because somebody says so. Raises `ExperimentEnded`."""
    return _ended(_running(state), "aborted", now, reason)


def _running(state: RampState) -> RampState:
    if state.status != "ramping":
        raise ExperimentEnded(f"the experiment has ended ({state.status}: {state.reason}); start another one")
    return state


def _ended(state: RampState, status: RampStatus, now: float, reason: str) -> RampState:
    share = 1.0 if status == "promoted" else 0.0
    return replace(state, moved_at=now, share=share, status=status, reason=reason)
