"""What Prometheus is told of an experiment: plain numbers that its director writes, read at scrape."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import Metric

EXPERIMENT_STATES = ("running", "promoted", "rejected", "aborted", "inconclusive")
"""How an experiment stands."""


@dataclass(slots=True)
class ExperimentMetrics:
    """The numbers of the last experiment; counters of rows and batches begin anew with each.

    `questions` has by question the estimate, the ends of its interval and the limit. `pairs` counts rows that both
    variants answered, `shadows` batches by what became of them, `moves` what was done to experiments.
    """

    name: str = ""
    base: str = ""
    candidate: str = ""
    state: str = ""
    share: float = 0.0
    questions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    pairs: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("agreed", "differed", "broken"), 0.0))
    shadows: dict[str, int] = field(default_factory=dict)
    moves: dict[str, int] = field(default_factory=dict)
    capped: Mapping[str, int] = field(default_factory=dict)
    prices: Callable[[], Mapping[str, float]] = dict
    """Of a million rows, by variant."""

    def collect(self, model: str) -> Iterator[Metric]:
        """All families; of those about an experiment none before the first."""
        yield _family("traffic_capped", "counter", "Requests beyond a variant's cap, sent to the base.", model).of(
            "version", self.capped
        )
        yield _family("cost_per_million_rows", "gauge", "Price of a million rows by device time.", model).of(
            "version", self.prices()
        )
        yield _family("experiment_moves", "counter", "What was done to experiments, by action.", model).of(
            "action", self.moves
        )
        yield _family("experiment_pairs", "counter", "Rows answered by base and candidate, by result.", model).of(
            "result", self.pairs
        )
        yield _family("experiment_shadows", "counter", "Batches to answer again, by outcome.", model).of(
            "outcome", self.shadows
        )
        if self.name:
            yield from self._of_the_last(model)

    def _of_the_last(self, model: str) -> Iterator[Metric]:
        labels = {"experiment": self.name, "base": self.base, "candidate": self.candidate}
        state = _family("experiment_state", "gauge", "1 for the state of the last experiment.", model, labels)
        yield state.of("state", {each: float(each == self.state) for each in EXPERIMENT_STATES})
        share = _family("experiment_share", "gauge", "Share (0-1) of the traffic of the candidate.", model, labels)
        yield share.of("", {"": self.share})
        named = {"experiment": self.name}
        for bound, text in _BOUNDS.items():
            family = _family(f"experiment_question_{bound}", "gauge", f"Of every question {text}.", model, named)
            known = {question: ends[bound] for question, ends in self.questions.items() if math.isfinite(ends[bound])}
            yield family.of("question", known)


_BOUNDS = {
    "estimate": "what was seen",
    "low": "the lower end of the interval",
    "high": "the upper end of the interval",
    "limit": "the limit",
}


class _Samples:
    """A family whose samples differ in one label."""

    def __init__(self, metric: Metric, labels: Mapping[str, str]) -> None:
        self._metric, self._labels = metric, labels

    def of(self, label: str, values: Mapping[str, float]) -> Metric:
        name = self._metric.name + ("_total" if self._metric.type == "counter" else "")
        for each, value in list(values.items()):
            self._metric.add_sample(name, {**self._labels, **({label: each} if label else {})}, value)
        return self._metric


def _family(name: str, kind: str, text: str, model: str, labels: Mapping[str, str] | None = None) -> _Samples:
    return _Samples(Metric(f"leanserve_{name}", text, kind), {"model": model, **(labels or {})})
