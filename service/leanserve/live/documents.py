"""What is told of traffic and experiments: the document of `GET /v1/experiment`."""

from __future__ import annotations

from typing import Literal

from leanserve.contracts import Json
from leanserve.experiments.answer_pairs import AnswerPairs, Slices, weakest_slices
from leanserve.experiments.cost import price_per_million
from leanserve.experiments.mean import MeanSums, RatioSums, mean_interval
from leanserve.experiments.verdict import Finding
from leanserve.live.director import Director
from leanserve.live.evidence_feed import ArmFeed
from leanserve.live.plain import plain
from leanserve.live.record import ExperimentRecord

MOST_SLICES = 50
_DROPS = ("full", "busy", "unfit")


def experiment_document(director: Director, price_per_hour: float | None) -> Json:
    """Traffic, what could be started, and the last experiment, as plain values."""
    unfit, config = director.unfit(), director.config
    ramp = config.ramp
    return plain(
        {
            "traffic": traffic_document(director),
            "candidates": [name for name in director.fleet.plans if name not in unfit],
            "unfit": unfit,
            "defaults": {
                "shadow_share": config.shadow_share,
                "shadow_time": config.shadow_time,
                "stages": ramp.stages,
                "min_stage_s": ramp.min_stage_s,
                "on_inconclusive": ramp.on_inconclusive,
                "limits": config.limits.model_dump(),
            },
            "experiment": None if director.record is None else _experiment(director, director.record, price_per_hour),
        }
    )


def traffic_document(director: Director) -> Json:
    """Who gets the requests that name no variant."""
    split, record = director.fleet.split, director.record
    decided_by: Literal["base", "weights", "experiment"] = "weights" if split.rules.weights else "base"
    if record is not None and record.weights is not None:
        decided_by = "experiment"
    return {
        "base": split.base,
        "weights": dict(split.rules.weights),
        "shares": {name: split.shares.get(name, 0.0) for name in director.fleet.plans},
        "caps": dict(split.rules.caps),
        "capped": dict(split.capped),
        "sticky_header": director.fleet.sticky_header.decode(),
        "decided_by": decided_by,
    }


def experiment_in_short(director: Director) -> Json:
    """Of the last experiment, what fits into a line; `None` before the first."""
    record = director.record
    if record is None:
        return None
    return {
        "name": record.name,
        "candidate": record.arms.candidate,
        "state": record.state,
        "share": record.ramp.share,
        "verdict": director.last.judgement.state if director.last else "keep_looking",
    }


def _experiment(director: Director, record: ExperimentRecord, price_per_hour: float | None) -> Json:
    ramp, rules, last = record.ramp, record.rules, director.last
    users = sum(arm.requests - arm.shadows for arm in (record.feed.base, record.feed.candidate))
    problems = last.problems if last else ()
    return {
        "name": record.name,
        "base": record.arms.base,
        "candidate": record.arms.candidate,
        "state": record.state,
        "reason": ramp.reason,
        "verdict": last.judgement.state if last else "keep_looking",
        "verdict_reason": last.judgement.reason if last else "nobody has looked at the evidence yet",
        "started_at": ramp.started_at,
        "moved_at": ramp.moved_at,
        "looked_at": director.looked_at or None,
        "stages": rules.policy.stages,
        "stage": ramp.stage,
        "share": ramp.share,
        "shadow_share": record.shadow_share,
        "limits": rules.limits.model_dump(),
        "questions": [_question(item) for item in last.judgement.findings] if last else [],
        "requests": users,
        "requests_to_decision": director.foreseen,
        "counts": _counts(director, record),
        "outputs": _outputs(record.pairs, rules.limits.alpha),
        "slices": _slices(record.pairs, rules.limits.alpha),
        "self_check": {"problems": problems, "rows": record.repeated.rows, "agreed": record.repeated.agreed},
        "cost": {
            record.arms.base: _price(record.feed.base.cost.device_s, price_per_hour),
            record.arms.candidate: _price(record.feed.candidate.cost.device_s, price_per_hour),
        },
        "series": record.series,
        "history": record.history,
    }


def _question(item: Finding) -> Json:
    is_share = item.evidence is not None
    return {
        "question": item.question,
        "answer": item.answer,
        "estimate": item.effect,
        "low": item.interval.low,
        "high": item.interval.high,
        "unit": "share" if is_share else "ratio",
        "limit": item.limit,
        "good": "above" if item.question == "agreement" else "below",
        "evidence": None if item.evidence is None else item.evidence._asdict(),
        "observations": item.observations,
        "reason": item.reason,
    }


def _counts(director: Director, record: ExperimentRecord) -> Json:
    pairs, shadows = record.pairs, director.shadows
    outcomes = {} if shadows is None else shadows.outcomes
    candidate = record.feed.candidate
    return {
        "base": _arm(record.feed.base),
        "candidate": _arm(candidate) | {"shadows": candidate.shadows},
        "pairs": {
            "rows": pairs.rows,
            "agreed": pairs.agreed,
            "broken": pairs.broken,
            "broken_share": pairs.broken / pairs.rows if pairs.rows else 0.0,
        },
        "shadow": {
            "compared": outcomes.get("compared", 0),
            "waiting": 0 if shadows is None else shadows.waiting,
            "dropped": {name: outcomes.get(name, 0) for name in _DROPS},
            "failed": candidate.shadow_failures,
            "time_share": 0.0 if shadows is None else shadows.time_share,
        },
    }


def _arm(arm: ArmFeed) -> dict[str, Json]:
    cost = arm.cost.device_s
    return {
        "requests": arm.requests,
        "failures": arm.failures,
        "timed": arm.service_s.count,
        "device_ms_per_row": 1000 * cost.per_row if cost.rows else None,
    }


def _outputs(pairs: AnswerPairs, alpha: float) -> list[Json]:
    return [
        {
            "name": name,
            "rows": item.rows,
            "agreement": item.agreed / item.rows if item.rows else None,
            "max_abs": item.max_abs,
            **{word: _mean(getattr(item, word), alpha) for word in ("kl", "cosine", "overlap")},
        }
        for name, item in pairs.outputs.items()
    ]


def _mean(sums: MeanSums, alpha: float) -> Json:
    return {"mean": sums.mean, **mean_interval(sums, alpha)._asdict()} if sums.count else None


def _slices(pairs: AnswerPairs, alpha: float) -> Json:
    classes = {name: _weakest(item.classes, alpha) for name, item in pairs.outputs.items() if item.classes}
    return {"classes": classes, "lengths": _weakest(pairs.lengths, alpha)}


def _weakest(slices: Slices, alpha: float) -> list[Json]:
    return [
        {"name": name, "rows": slices[name].rows, "agreed": slices[name].agreed, "share": share, **interval._asdict()}
        for name, share, interval in weakest_slices(slices, alpha)[:MOST_SLICES]
    ]


def _price(device_s: RatioSums, price_per_hour: float | None) -> Json:
    price = None if price_per_hour is None else price_per_million(device_s, price_per_hour)
    return None if price is None else {"per_million": price.per_million, **price.interval._asdict()}
