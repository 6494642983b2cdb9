"""The report in words: which variant to take, by which rule, how sure that is, and where it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from leanserve.report.columns import amount, milliseconds, money, ratio
from leanserve.report.summary import Measure, Summary, VariantSummary, Yardstick

RULES: Mapping[Measure, str] = {
    "score": "its score on the gate split is at most 0.5 points below that of the base",
    "score of one": "its score on the gate split is at most 0.5 points below that of the base, and its worst output "
    "agrees with that of the base to at least 95 %",
    "classes": "its top answer is that of the base in at least 99.5 % of the rows (there are no labels to score)",
    "embeddings": "its embeddings have a mean cosine similarity of at least 0.99 to those of the base (there are no "
    "labels to score)",
    "outputs": "its worst output agrees with that of the base to at least 95 %, which for values is an error of 5 % of "
    "their spread (there are no labels to score)",
}
"""When answers are right; the numbers are those of `summary.TOLERANCES`."""


@dataclass(frozen=True, slots=True)
class Headline:
    """The claim (which begins with `name` where a variant earned it), the rule behind it, and any doubt about it.

    `caveat` is what the base brings along, whatever the numbers are.
    """

    name: str
    claim: str
    rule: str
    caution: str
    caveat: str


def headline(summary: Summary) -> Headline:
    """Say which variant is the cheapest that still answers right, or why none is."""
    rule = _rule(summary.yardstick)
    if summary.cheapest is None:
        return Headline("", _why_none(summary), rule, "", _caveat(summary))
    best = summary.cheapest
    cautions = " ".join(filter(None, (_caution(summary.yardstick, best), _disturbance(summary))))
    return Headline(best.name, _claim(summary, best), rule, cautions, _caveat(summary))


def tiles(summary: Summary) -> tuple[tuple[str, str, str], ...]:
    """Four numbers of the cheapest variant as (title, value, the base's value); none without such a variant."""
    if summary.cheapest is None:
        return ()
    yardstick, item = summary.yardstick, summary.cheapest.measured
    rows = min(summary.batches, default=1)
    return (
        ("rows per second", f"{item.quality.throughput:,.0f}", f"{item.base.throughput:,.0f}"),
        (
            f"ms for {rows} row{'s' if rows > 1 else ''}",
            milliseconds(item.quality.latency_ms.get(rows)),
            milliseconds(item.base.latency_ms.get(rows)),
        ),
        ("on disk", amount(item.quality.disk_bytes, "B"), amount(item.base.disk_bytes, "B")),
        (
            noun(yardstick),
            share_text(yardstick.value(item.quality)),
            share_text(yardstick.value(item.base)),
        ),
    )


def noun(yardstick: Yardstick) -> str:
    """What the number is called by which answers are judged."""
    return "score" if yardstick.scored else "agreement with the base"


def share_text(value: float | None) -> str:
    """A number in per cent; a dash where it was not measured."""
    return "–" if value is None else f"{value:.2f} %"


def hardware(summary: Summary) -> tuple[str, ...]:
    """Where it was measured: a line for every machine and a last one for the library versions."""
    machines = {
        (manifest.cpu, manifest.threads, " ".join(manifest.hardware.isa) or "no special instruction sets")
        for manifest in summary.manifests
    }
    lines = [f"{cpu}, {threads} thread{'s' if threads != 1 else ''}, {isa}" for cpu, threads, isa in sorted(machines)]
    if len(lines) > 1:
        lines.insert(0, "Measured on different machines or thread counts: compare gains with care.")
    versions = sorted({item for manifest in summary.manifests for item in manifest.versions.items()})
    return (*lines, ", ".join(f"{name} {version}" for name, version in versions))


def _claim(summary: Summary, best: VariantSummary) -> str:
    item = best.measured
    smaller = f" and {ratio(item.shrinkage)} smaller on disk" if item.shrinkage >= 1.05 else ""
    return (
        f"is the cheapest variant that still answers right: {ratio(item.gain)} the throughput of the base{smaller}, "
        f"{_money(summary, best)}{_price(summary.yardstick, best)}.{_equals(summary)}"
    )


def _money(summary: Summary, best: VariantSummary) -> str:
    """What a million predictions cost at this quality, where the price of the machine is known."""
    price, item = summary.price, best.measured
    if price is None:
        return ""
    ours, theirs = (money(price.per_million(quality)) for quality in (item.quality, item.base))
    return f"{ours} {price.currency} per million predictions (the base: {theirs}) "


def _equals(summary: Summary) -> str:
    """The others that are as fast, as far as can be told."""
    names = [variant.name for variant in summary.fastest[1:]]
    if not names:
        return ""
    which = f"{names[0]} is" if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]} are"
    return f" Within noise {which} as fast; its answers are the best."


def _price(yardstick: Yardstick, best: VariantSummary) -> str:
    drop = best.measured.drop
    value = share_text(yardstick.value(best.measured.quality))
    if not yardstick.scored or drop is None:
        return f"at {value} {noun(yardstick)}"
    if abs(drop) < 0.005:
        return f"at the same score of {value}"
    return f"for {abs(drop):.2f} points of score {'lost' if drop > 0 else 'won'} ({value})"


def _why_none(summary: Summary) -> str:
    compressed = [variant for variant in summary.variants if variant.passes]
    if not compressed:
        return "Only the uncompressed base was measured: there is nothing to choose from yet."
    serving = [variant for variant in compressed if variant.state == "serving"]
    if not serving:
        return "No compressed variant passed its gate: keep the base."
    if not any(summary.yardstick.accepts(variant.measured) for variant in serving):
        return "No compressed variant still answers right: keep the base."
    return "No compressed variant that still answers right is measurably faster than the base: keep the base."


def _rule(yardstick: Yardstick) -> str:
    return (
        f"A variant answers right if it passed its own gate and {RULES[yardstick.measure]}. "
        "The cheapest of these is the one with the most rows per second; of several that are equal within noise, the "
        "one with the best answers."
    )


def _caveat(summary: Summary) -> str:
    return f"Mind the base: {', '.join(summary.caveats)}." if summary.caveats else ""


def _disturbance(summary: Summary) -> str:
    """That speeds are not those of a quiet machine."""
    waited = max((item.quality.waited for item in summary.measured if item.quality.disturbed), default=None)
    if waited is None:
        return ""
    return (
        f"Mind the machine: other work disturbed the timing (threads waited {waited:.0%} of a turn for a processor); "
        "on a quiet one, `leanserve build` measures again."
    )


def _caution(yardstick: Yardstick, best: VariantSummary) -> str:
    """What the confidence interval leaves open."""
    quality = best.measured.quality
    interval, floor = yardstick.interval(quality), yardstick.floor(best.measured.base)
    if interval is None or floor is None or interval[0] >= floor:
        return ""
    return (
        f"Mind the sample: over {quality.samples:,} rows the 95 % interval of its score is {interval[0]:.2f} to "
        f"{interval[1]:.2f} %, which reaches below the {floor:.2f} % that the rule "
        "asks for. More gate rows make it surer."
    )
