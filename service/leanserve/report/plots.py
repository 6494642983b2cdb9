"""The plots of the page: answers against latency, size, and what each pass brought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from leanserve.report.columns import amount, milliseconds, ratio
from leanserve.report.headline import noun, share_text
from leanserve.report.summary import StepSummary, Summary, VariantSummary, Yardstick
from leanserve.report.svg import ACCENT, BAD, GOOD, INK, LINE, MUTED, SURFACE, bare, inline, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGEST_NAME = 22
_COLOURS = {"serving": ACCENT, "excluded": BAD, "reference": MUTED}


def tradeoff(summary: Summary) -> str:
    """Answers against latency: a numbered mark for each variant, with the confidence interval of its score."""
    rows = min(summary.batches, default=1)
    figure = new_figure(4.1)
    axes = figure.add_subplot()
    bare(axes)
    for variant in reversed(summary.variants):
        _mark(axes, variant, summary, rows)
    floor = summary.yardstick.floor(summary.reference.quality)
    if floor is not None:
        axes.axhline(floor, color=GOOD, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    _latency_scale(axes, summary, rows)
    axes.set_xlabel(f"median ms for {rows} row{'s' if rows > 1 else ''} (left is faster)")
    axes.set_ylabel(f"{noun(summary.yardstick)} %")
    axes.margins(x=0.09, y=0.12)
    facts = "; ".join(
        f"{variant.name} {share_text(summary.yardstick.value(variant.measured.quality))} "
        f"at {milliseconds(variant.measured.quality.latency_ms.get(rows))} ms"
        for variant in summary.variants
    )
    return inline(figure, "tradeoff", f"{noun(summary.yardstick)} against latency: {facts}")


def sizes(summary: Summary) -> str:
    """A bar for every variant's size on disk."""
    figure = new_figure(0.5 + 0.3 * len(summary.variants))
    axes = figure.add_subplot()
    bare(axes)
    places = range(len(summary.variants))
    values = [variant.measured.quality.disk_bytes for variant in summary.variants]
    colours = [_colour(variant, summary) for variant in summary.variants]
    fills = [SURFACE if variant.state == "excluded" else _colour(variant, summary) for variant in summary.variants]
    axes.barh(places, values, height=0.62, color=fills, edgecolor=colours, linewidth=1.2)
    for place, value in zip(places, values, strict=True):
        axes.annotate(
            amount(value, "B"),
            (value, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            size=11,
            color=INK,
        )
    _rows(axes, [_short(f"{_number(variant)} {variant.name}") for variant in summary.variants])
    axes.set_xlim(0, max(values) * 1.2 or 1)
    axes.set_xticks([])
    facts = "; ".join(
        f"{variant.name} {amount(variant.measured.quality.disk_bytes, 'B')}" for variant in summary.variants
    )
    return inline(figure, "sizes", f"size on disk: {facts}")


def waterfall_plot(variant: VariantSummary, yardstick: Yardstick) -> str:
    """Throughput gain and answers after each pass; a bar spans what its pass added or took away."""
    figure = new_figure(0.75 + 0.3 * len(variant.steps))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    bare(left)
    bare(right)
    _gain_bars(left, variant.steps)
    _answer_line(right, variant.steps, yardstick)
    _rows(left, [step.measured.label for step in variant.steps])
    left.set_xlabel("throughput over the base")
    right.set_xlabel("score %" if yardstick.scored else "agreement %")
    facts = "; ".join(
        f"after {step.measured.label} {ratio(step.measured.gain)} the throughput at "
        f"{share_text(yardstick.value(step.measured.quality))}"
        for step in variant.steps
    )
    return inline(figure, f"waterfall_plot-{variant.number}", f"{variant.name} pass by pass: {facts}")


def barriers(variant: VariantSummary) -> str:
    """The loss on the straight way between two parents, where a pass has looked: what stands above the dashed line is a
    barrier, on which their mean would stand. Empty where none has."""
    found = [(step, step.manifest.decisions["curves"]) for step in variant.steps if "curves" in step.manifest.decisions]
    return "".join(_barrier(variant, step, curves) for step, curves in found)


def _barrier(variant: VariantSummary, step: StepSummary, curves: Mapping[str, Sequence[float]]) -> str:
    figure = new_figure(2.2)
    axes = figure.add_subplot()
    bare(axes)
    for colour, (name, losses) in zip((MUTED, ACCENT, GOOD), curves.items(), strict=False):
        places = [place / (len(losses) - 1) for place in range(len(losses))]
        axes.plot(places, losses, "o-", color=colour, markersize=5, linewidth=1.5)
        axes.plot([0, 1], [losses[0], losses[-1]], color=colour, linewidth=1, linestyle=(0, (4, 3)))
        middle = len(losses) // 2
        axes.annotate(
            name, (places[middle], losses[middle]), xytext=(0, 6), textcoords="offset points", ha="center", size=11,
            color=colour,
        )  # fmt: skip
    axes.set_xticks([0, 0.5, 1], ["first parent", "halfway", "second parent"])
    axes.set_ylabel("distance from the base")
    axes.margins(x=0.12, y=0.2)
    facts = "; ".join(f"{name} {', '.join(f'{loss:.3g}' for loss in losses)}" for name, losses in curves.items())
    told = f"{variant.name}, {step.measured.label}: loss from the first to the second parent: {facts}"
    return inline(figure, f"barrier-{variant.number}-{variant.steps.index(step)}", told)


def _mark(axes: Axes, variant: VariantSummary, summary: Summary, rows: int) -> None:
    quality, yardstick = variant.measured.quality, summary.yardstick
    latency, value = quality.latency_ms.get(rows), yardstick.value(quality)
    if latency is None or value is None:
        return
    colour, interval = _colour(variant, summary), yardstick.interval(quality)
    if interval is not None:
        axes.plot([latency, latency], interval, color=colour, linewidth=1.5, alpha=0.55, zorder=2)
    hollow = variant.state == "excluded"
    axes.plot(
        [latency], [value], "o", markersize=17, color=SURFACE if hollow else colour, markeredgecolor=colour if hollow
        else SURFACE, markeredgewidth=1.5, zorder=3,
    )  # fmt: skip
    axes.annotate(
        _number(variant), (latency, value), ha="center", va="center_baseline", size=11, weight="bold",
        color=colour if hollow else SURFACE, zorder=4,
    )  # fmt: skip


def _latency_scale(axes: Axes, summary: Summary, rows: int) -> None:
    """A logarithmic axis where latencies span much, as between torch eager and an int8 graph; plain numbers on it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    every = [variant.measured.quality.latency_ms.get(rows) for variant in summary.variants]
    known = [latency for latency in every if latency]
    if known and max(known) > 3 * min(known):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _gain_bars(axes: Axes, steps: tuple[StepSummary, ...]) -> None:
    before = 0.0
    for place, step in enumerate(steps):
        gain = step.measured.gain
        colour = MUTED if place == 0 else GOOD if gain >= before else BAD
        axes.barh(place, gain - before, left=before, height=0.62, color=colour)
        axes.annotate(
            ratio(gain),
            (max(gain, before), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            size=11,
            color=INK,
        )
        if place + 1 < len(steps):
            axes.plot([gain, gain], [place, place + 1], color=LINE, linewidth=1, zorder=0.5)
        before = gain
    axes.set_xlim(0, 1.25 * max(step.measured.gain for step in steps))
    axes.xaxis.grid(visible=False)
    axes.set_xticks([])


def _answer_line(axes: Axes, steps: tuple[StepSummary, ...], yardstick: Yardstick) -> None:
    points = [(yardstick.value(step.measured.quality), place) for place, step in enumerate(steps)]
    known = [(value, place) for value, place in points if value is not None]
    axes.plot(
        [value for value, _ in known], [place for _, place in known], "o-", color=ACCENT, markersize=5, linewidth=1.5
    )
    for place, step in enumerate(steps):
        interval = yardstick.interval(step.measured.quality)
        if interval is not None:
            axes.plot(interval, [place, place], color=ACCENT, linewidth=4, alpha=0.25, solid_capstyle="round")
    floor = yardstick.floor(steps[0].measured.base)
    if floor is not None:
        axes.axvline(floor, color=GOOD, linewidth=1, linestyle=(0, (4, 3)))
    axes.locator_params(axis="x", nbins=3)
    axes.margins(x=0.12)


def _rows(axes: Axes, names: list[str]) -> None:
    """Name the rows, from top to bottom. `$` in a name is a dollar, not mathematics."""
    axes.set_yticks(range(len(names)), names, color=INK, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.yaxis.grid(visible=False)


def _colour(variant: VariantSummary, summary: Summary) -> str:
    return GOOD if variant is summary.cheapest else _COLOURS[variant.state]


def _number(variant: VariantSummary) -> str:
    """The mark that stands for a variant all over the page."""
    return str(variant.number or "B")


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
