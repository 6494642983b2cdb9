"""The report as JSON, with the numbers of table and HTML: `GET /v1/report` answers it, the page at `/` draws it."""

from __future__ import annotations

from leanserve.contracts import Json
from leanserve.report.headline import headline, noun
from leanserve.report.summary import MeasuredArtifact, StepSummary, Summary, VariantSummary


def report_document(summary: Summary) -> Json:
    """Headline, yardstick and every variant pass by pass. Answers are in per cent, sizes in bytes, times in ms."""
    told, yardstick = headline(summary), summary.yardstick
    return {
        "base": summary.base,
        "headline": {
            "name": told.name,
            "claim": told.claim,
            "rule": told.rule,
            "cautions": [text for text in (told.caution, told.caveat, summary.elsewhere) if text],
        },
        "yardstick": {
            "name": noun(yardstick),
            "floor": yardstick.floor(summary.reference.quality),
            "samples": summary.reference.quality.samples,
        },
        "variants": [_variant(variant, summary) for variant in summary.variants],
        "unmade": [item.name for item in summary.unmade],
    }


def _variant(variant: VariantSummary, summary: Summary) -> Json:
    return {
        "number": variant.number,
        "name": variant.name,
        "state": variant.state,
        "cheapest": variant is summary.cheapest,
        "flow": variant.flow,
        **_measured(variant.measured, summary),
        "steps": [_step(step, summary) for step in variant.steps],
    }


def _step(step: StepSummary, summary: Summary) -> Json:
    return {"label": step.measured.label, **_measured(step.measured, summary)}


def _measured(measured: MeasuredArtifact, summary: Summary) -> Json:
    """`value` and its interval are of the yardstick, `gain` of the throughput over the base's."""
    quality, yardstick = measured.quality, summary.yardstick
    low, high = yardstick.interval(quality) or (None, None)
    return {
        "gain": measured.gain,
        "gain_low": quality.speedup_low,
        "gain_high": quality.speedup_high,
        "value": yardstick.value(quality),
        "value_low": low,
        "value_high": high,
        "throughput": quality.throughput,
        "latency_ms": {str(rows): ms for rows, ms in quality.latency_ms.items()},
        "disk_bytes": quality.disk_bytes,
        "simulated": measured.simulated,
        "build_s": measured.seconds,
    }
