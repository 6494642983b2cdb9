"""What Prometheus is told of the last experiment: plain numbers, written whenever they change."""

from __future__ import annotations

from leanserve.live.looking import Look
from leanserve.live.record import ExperimentRecord
from leanserve.live.shadows import Shadows
from leanserve.telemetry.experiment_metrics import ExperimentMetrics


def write_metrics(
    metrics: ExperimentMetrics, record: ExperimentRecord, shadows: Shadows | None, look: Look | None
) -> None:
    """Write all of it."""
    pairs = record.pairs
    metrics.name, metrics.base, metrics.candidate = record.name, record.arms.base, record.arms.candidate
    metrics.state, metrics.share = record.state, record.ramp.share
    metrics.pairs = {"agreed": pairs.agreed, "differed": pairs.rows - pairs.agreed, "broken": pairs.broken}
    metrics.shadows = dict(shadows.outcomes) if shadows is not None else {}
    findings = look.judgement.findings if look is not None else ()
    metrics.questions = {
        item.question: {"estimate": item.effect, **item.interval._asdict(), "limit": item.limit} for item in findings
    }
