"""An experiment as it is kept: what was asked for, where it is, all of its evidence, and how it came there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, Self

from leanserve.contracts import Json
from leanserve.experiments.answer_pairs import AnswerPairs
from leanserve.experiments.ramp import RampPolicy, RampState, Rules
from leanserve.experiments.verdict import Finding, Limits
from leanserve.live.evidence_feed import EvidenceFeed
from leanserve.live.plain import plain

MOST_MOVES, MOST_POINTS = 100, 200

ExperimentState = Literal["running", "promoted", "rejected", "aborted", "inconclusive"]
Action = Literal["start", "step", "promote", "reject", "abort", "end"]
ACTIONS: Final[Mapping[ExperimentState, Action]] = {
    "running": "step",
    "promoted": "promote",
    "rejected": "reject",
    "aborted": "abort",
    "inconclusive": "end",
}
"""What it is called when an experiment comes into a state."""


class Arms(NamedTuple):
    """Who is compared: names, and the models that they stand for (`VariantPlan.content`), which restarts may change."""

    base: str
    candidate: str
    contents: tuple[str, str]


@dataclass(slots=True)
class ExperimentRecord:
    """One experiment. `holds` is whether the traffic still goes as it has it; `back_to` is who had it all before, and
    `configured` the weights of the config at the last move."""

    name: str
    arms: Arms
    rules: Rules
    shadow_share: float
    shadow_time: float
    ramp: RampState
    back_to: str = ""
    holds: bool = True
    state: ExperimentState = "running"
    feed: EvidenceFeed = field(default_factory=EvidenceFeed)
    pairs: AnswerPairs = field(default_factory=AnswerPairs)
    repeated: AnswerPairs = field(default_factory=AnswerPairs)
    history: list[Json] = field(default_factory=list)
    series: list[Json] = field(default_factory=list)
    configured: dict[str, float] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, float] | None:
        """The split that it asks for; `None`: any."""
        if not self.holds:
            return None
        if self.state == "running":
            return {self.arms.base: 1 - self.ramp.share, self.arms.candidate: self.ramp.share}
        if self.state == "promoted":
            return {self.arms.candidate: 1.0}
        return {self.back_to: 1.0} if self.back_to else None

    def move(self, ramp: RampState, state: ExperimentState, who: str, at: float, action: Action | None = None) -> Json:
        """Go to another state; what is remembered of it."""
        self.ramp, self.state = ramp, state
        told = {
            "who": who,
            "action": action or ACTIONS[state],
            "state": state,
            "stage": ramp.stage,
            "share": ramp.share,
        }
        entry = {"at": at, **told, "reason": ramp.reason}
        self.history = [*self.history, entry][-MOST_MOVES:]
        return entry

    def remember(self, at: float, requests: float, findings: tuple[Finding, ...]) -> None:
        """Keep a point of the series; when there are many, of the older ones only every other."""
        questions = {item.question: [item.effect, *item.interval] for item in findings}
        self.series.append({"at": at, "requests": requests, "questions": plain(questions)})
        if len(self.series) > MOST_POINTS:
            self.series = [*self.series[:-1:2], self.series[-1]]

    def to_json(self) -> Json:
        """As plain values."""
        return {
            "name": self.name,
            "arms": list(self.arms),
            "limits": self.rules.limits.model_dump(),
            "ramp_policy": self.rules.policy.model_dump(),
            "shadow": [self.shadow_share, self.shadow_time],
            "ramp": self.ramp.to_json(),
            "back_to": self.back_to,
            "holds": self.holds,
            "state": self.state,
            "feed": self.feed.to_json(),
            "pairs": self.pairs.to_json(),
            "repeated": self.repeated.to_json(),
            "history": self.history,
            "series": [*self.series],
            "configured": self.configured,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Json]) -> Self:
        """Of what `to_json` made."""
        base, candidate, contents = stored["arms"]
        policy = RampPolicy(**{**stored["ramp_policy"], "stages": tuple(stored["ramp_policy"]["stages"])})
        return cls(
            stored["name"],
            Arms(base, candidate, (contents[0], contents[1])),
            Rules(Limits(**stored["limits"]), policy),
            stored["shadow"][0],
            stored["shadow"][1],
            RampState.from_json(stored["ramp"]),
            stored["back_to"],
            stored["holds"],
            stored["state"],
            EvidenceFeed.from_json(stored["feed"]),
            AnswerPairs.from_json(stored["pairs"]),
            AnswerPairs.from_json(stored["repeated"]),
            stored["history"],
            stored["series"],
            stored["configured"],
        )
