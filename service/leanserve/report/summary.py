"""What the report says, before anyone decides how it looks.

Terminal and page must never disagree, so gains, drops and above all the choice of the cheapest variant that still
answers right are computed here, once, from the manifests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from leanserve.artifacts.benchmarks import Change, Speedup
from leanserve.artifacts.manifest import Manifest, Quality, VariantReport
from leanserve.contracts import CLASSES

Measure = Literal["score", "score of one", "classes", "embeddings", "outputs"]
State = Literal["serving", "excluded", "reference"]
TOLERANCES: Mapping[Measure, float] = {
    "score": 0.5,
    "score of one": 0.5,
    "classes": 0.5,
    "embeddings": 1.0,
    "outputs": 5.0,
}
"""Points. A cosine of 0.99 is an error of some 14 %, so that 5 % of values are no less strict."""


class HourlyPrice(NamedTuple):
    """What an hour of the machine costs."""

    amount: float
    currency: str

    def per_million(self, quality: Quality) -> float:
        """Price of a million rows at the measured throughput, of a machine that has nothing else to do."""
        return self.amount / 3600 * 1e6 / quality.throughput


@dataclass(frozen=True, slots=True)
class MeasuredArtifact:
    """The quality of one artifact beside that of its base; `seconds` is the time that building it took."""

    label: str
    quality: Quality
    base: Quality
    seconds: float
    simulated: bool
    change: Change | None = None
    """Of one step: its throughput beside that of the step before."""

    @property
    def gain(self) -> float:
        """Throughput over that of the base."""
        return self.quality.throughput / self.base.throughput

    @property
    def speedup(self) -> Speedup:
        """The gain, with the range in which its rounds leave it."""
        return Speedup(self.gain, self.quality.speedup_low, self.quality.speedup_high)

    @property
    def shrinkage(self) -> float:
        """Size of the base on disk over that of the artifact."""
        return self.base.disk_bytes / max(1, self.quality.disk_bytes)

    @property
    def drop(self) -> float | None:
        """Points of score (hundredths) lost against the base; negative where the artifact is better."""
        if self.quality.score is None or self.base.score is None:
            return None
        return 100 * (self.base.score - self.quality.score)


@dataclass(frozen=True, slots=True)
class StepSummary:
    """What a variant was worth after one of its passes; or what one of the variants was worth that it joins."""

    measured: MeasuredArtifact
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class VariantSummary:
    """A row of the report. `number` marks the variant in the plots; the reference row of the bare base has 0."""

    number: int
    name: str
    state: State
    reason: str | None
    measured: MeasuredArtifact
    steps: tuple[StepSummary, ...]
    """The base first; then the variants that it joins, if it joins some; then its passes."""
    joined: int = 0
    """How many variants it joins."""
    doubt: str | None = None
    """What its gate could not decide."""

    @property
    def passes(self) -> tuple[str, ...]:
        """The labels of its steps after the base, simulated ones marked."""
        return tuple(step.measured.label for step in self.steps[1:])

    @property
    def flow(self) -> str:
        """Its passes in order, after the names of the variants that they join: `a + b → merge → fold_bn`."""
        first = [" + ".join(self.passes[: self.joined])] if self.joined else []
        return " → ".join([*first, *self.passes[self.joined :]]) or "none"


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What calls answers right: the score, else the agreement of the worst output with the base's; both in per cent."""

    measure: Measure
    """`score`; `score of one`, where labels say nothing of other outputs, which must agree as those of `outputs`; else
    what all outputs are whose agreement counts; `outputs`: values, or of several kinds."""

    @property
    def scored(self) -> bool:
        """Whether the number is the score."""
        return self.measure in {"score", "score of one"}

    @property
    def tolerance(self) -> float:
        """Points by which a variant may fall short."""
        return TOLERANCES[self.measure]

    def value(self, quality: Quality) -> float | None:
        """The measured number."""
        value = quality.score if self.scored else quality.agreement
        return None if value is None else 100 * value

    def interval(self, quality: Quality) -> tuple[float, float] | None:
        """The 95 % confidence interval; only scores have one."""
        if not self.scored or quality.score_low is None or quality.score_high is None:
            return None
        return 100 * quality.score_low, 100 * quality.score_high

    def floor(self, base: Quality) -> float | None:
        """The least value that counts as a right answer. A base agrees with itself by definition."""
        value = self.value(base) if self.scored else 100.0
        return None if value is None else value - self.tolerance

    def accepts(self, measured: MeasuredArtifact) -> bool:
        """Whether the variant still answers right; rounding of the stored numbers is forgiven."""
        value, floor = self.value(measured.quality), self.floor(measured.base)
        if self.measure == "score of one" and 100 * measured.quality.agreement < 100 - TOLERANCES["outputs"] - 1e-9:
            return False
        return value is not None and floor is not None and value >= floor - 1e-9


@dataclass(frozen=True, slots=True)
class UnmadeVariant:
    """A variant of which a pass could not be applied, so that there are no numbers of it."""

    number: int
    name: str
    reason: str


@dataclass(frozen=True)
class Summary:
    """Everything that the report shows, in the order in which the variants were given."""

    base: str
    variants: tuple[VariantSummary, ...]
    yardstick: Yardstick
    caveats: tuple[str, ...] = ()
    """What is true of every number in it: the base is `untrained`, its rows are `synthetic data`."""
    elsewhere: str = ""
    """In a sentence, that the numbers were measured on another machine; empty: they were measured on this one."""
    unmade: tuple[UnmadeVariant, ...] = ()
    price: HourlyPrice | None = None

    @property
    def mark(self) -> str:
        """What stands behind the title of every table whose numbers depend on the machine."""
        return " (measured on another machine)" if self.elsewhere else ""

    @cached_property
    def manifests(self) -> tuple[Manifest, ...]:
        """Every artifact in the report, those shared by several variants once."""
        every = (step.manifest for variant in self.variants for step in variant.steps)
        return tuple({manifest.key: manifest for manifest in every}.values())

    @cached_property
    def measured(self) -> tuple[MeasuredArtifact, ...]:
        """Every variant as a whole."""
        return tuple(variant.measured for variant in self.variants)

    @cached_property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes at which latency was measured."""
        return tuple(sorted({rows for variant in self.variants for rows in variant.measured.quality.latency_ms}))

    @cached_property
    def reference(self) -> MeasuredArtifact:
        """The uncompressed base, as the first variant met it."""
        return self.variants[0].steps[0].measured

    @cached_property
    def fastest(self) -> tuple[VariantSummary, ...]:
        """The compressed variants that serve, answer right, and are as fast as the fastest of these within noise.

        None, where the base is as fast as that. Those with the better answers come first.
        """
        able = [item for item in self.variants if item.state == "serving" and self.yardstick.accepts(item.measured)]
        compressed = [item for item in able if item.passes]
        best = max(compressed, key=lambda item: item.measured.gain, default=None)
        if best is None or best.measured.speedup.change != "faster":
            return ()
        equal = [item for item in compressed if best.measured.speedup.over(item.measured.speedup).change != "faster"]
        return tuple(sorted(equal, key=self._by_answers))

    def _by_answers(self, variant: VariantSummary) -> tuple[float, float]:
        return -(self.yardstick.value(variant.measured.quality) or 0.0), -variant.measured.gain

    @property
    def cheapest(self) -> VariantSummary | None:
        """Of the fastest, the one with the best answers."""
        return self.fastest[0] if self.fastest else None


def summarise(
    reports: Sequence[VariantReport],
    caveats: Sequence[str] = (),
    elsewhere: str = "",
    price: HourlyPrice | None = None,
) -> Summary:
    """Compute what the report shows. A reference row of the bare base is put first unless a variant is just that.

    Raises:
        ValueError: there is no variant to report.
    """
    if not reports:
        raise ValueError("nothing to report: the list of variants is empty; build at least one variant first")
    ends = {report.ancestry[-1].key: report for report in reversed(reports)}
    numbered = tuple(enumerate(reports, start=1))
    unmade = tuple(UnmadeVariant(number, item.name, item.reason or "") for number, item in numbered if not item.built)
    variants = [_variant(number, report, ends) for number, report in numbered if report.built]
    if all(variant.passes for variant in variants):
        reference = _variant(0, reports[0], ends).steps[0]
        name = f"base ({reference.manifest.base})"
        variants.insert(0, VariantSummary(0, name, "reference", None, reference.measured, (reference,)))
    base = reports[0].ancestry[0].base
    return Summary(base, tuple(variants), _yardstick(reports), tuple(caveats), elsewhere, unmade, price)


def _variant(number: int, report: VariantReport, ends: Mapping[str, VariantReport]) -> VariantSummary:
    """`ends` has the variants by the key of their last artifact."""
    base = report.ancestry[0].quality
    joining = max((place for place, item in enumerate(report.ancestry) if len(item.parents) > 1), default=None)
    joined = [] if joining is None else [ends[key] for key in report.ancestry[joining].parents]
    line = report.ancestry if joining is None else (report.ancestry[0], *report.ancestry[joining:])
    steps = [StepSummary(_measured(manifest, base), manifest) for manifest in line]
    steps[1:1] = [StepSummary(_whole(parent), parent.ancestry[-1]) for parent in joined]
    told = (number, report.name, report.state, report.reason)
    return VariantSummary(*told, _whole(report), tuple(steps), joined=len(joined), doubt=report.doubt)


def _whole(report: VariantReport) -> MeasuredArtifact:
    return MeasuredArtifact(
        label=report.name,
        quality=report.quality,
        base=report.ancestry[0].quality,
        seconds=sum(manifest.seconds for manifest in report.ancestry),
        simulated=any(manifest.simulated for manifest in report.ancestry),
    )


def _measured(manifest: Manifest, base: Quality) -> MeasuredArtifact:
    label = manifest.kind or "base"
    return MeasuredArtifact(
        label=f"{label} (simulated)" if manifest.simulated else label,
        quality=manifest.quality,
        base=base,
        seconds=manifest.seconds,
        simulated=manifest.simulated,
        change=manifest.change,
    )


def _yardstick(reports: Sequence[VariantReport]) -> Yardstick:
    """Labels decide where there are any, the same answers as the base's otherwise."""
    qualities = [manifest.quality for report in reports for manifest in report.ancestry]
    if all(quality.score is not None for quality in qualities):
        return Yardstick("score" if all(len(quality.outputs) == 1 for quality in qualities) else "score of one")
    meanings = {output.meaning for quality in qualities for output in quality.outputs}
    if meanings <= CLASSES:
        return Yardstick("classes")
    return Yardstick("embeddings" if meanings == {"embedding"} else "outputs")
