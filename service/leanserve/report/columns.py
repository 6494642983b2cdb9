"""The columns of the report's tables: one definition for the terminal and the page, units included."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from leanserve.artifacts.manifest import OutputFidelity
from leanserve.report.summary import HourlyPrice, MeasuredArtifact

ABSENT = "–"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of numbers: its title, what it means in a sentence, and the text of its cell."""

    title: str
    meaning: str
    cell: Callable[[MeasuredArtifact], str]


def share(value: float | None) -> str:
    """A share as per cent with two decimals; a dash where it was not measured."""
    return ABSENT if value is None else f"{100 * value:.2f} %"


def amount(value: float, unit: str = "") -> str:
    """Three significant digits with a decimal prefix: `1.23 M`, `48.0 kB`."""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{_three_digits(value / size)} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def ratio(value: float) -> str:
    """A gain, as in `4.20×`."""
    return f"{_three_digits(value) if value >= 1 else format(value, '.2f')}×"


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds from two minutes on."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{int(round(seconds) // 60)} min {int(round(seconds) % 60)} s"


def score(measured: MeasuredArtifact) -> str:
    """The score with its 95 % confidence interval, in per cent."""
    quality = measured.quality
    if quality.score is None:
        return ABSENT
    if quality.score_low is None or quality.score_high is None:
        return f"{100 * quality.score:.2f}"
    return f"{100 * quality.score:.2f} [{100 * quality.score_low:.2f}, {100 * quality.score_high:.2f}]"


def drop(measured: MeasuredArtifact) -> str:
    """Points lost against the base, and how many it may be; a gain has a minus sign."""
    if measured.drop is None:
        return ABSENT
    most = measured.quality.drop_high
    return f"{points(measured.drop)} ({ABSENT if most is None else points(100 * most)})"


def points(value: float) -> str:
    """Hundredths of a score, with two decimals."""
    return f"{value + 0.0:.2f}".replace("-0.00", "0.00").replace("-", "−")


def divergence(kl: float | None) -> str:
    """Nats with four decimals; a dash where it was not measured."""
    if kl is None:
        return ABSENT
    return "<0.0001" if 0 < kl < 0.0001 else f"{kl:.4f}"


def four_decimals(value: float | None) -> str:
    """A number around 1; a dash where it was not measured."""
    return ABSENT if value is None else f"{value:.4f}"


def milliseconds(value: float | None) -> str:
    """A latency with three significant digits; a dash where it was not measured."""
    return ABSENT if value is None else _three_digits(value)


def _three_digits(value: float) -> str:
    magnitude = abs(value)
    if magnitude >= 99.95:
        return f"{value:,.0f}"
    if magnitude >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if magnitude >= 0.9995 else f"{value:.3f}"


def _latency(rows: int) -> Column:
    return Column(
        f"ms at {rows}",
        f"median milliseconds for a batch of {rows} row{'s' if rows > 1 else ''}",
        lambda item: milliseconds(item.quality.latency_ms.get(rows)),
    )


SCORE = Column(
    "score % [95 % CI]",
    "accuracy, or what else the base is scored by, on the gate split, with its 95 % confidence interval",
    score,
)
DROP = Column(
    "drop (≤), pts",
    "points of score lost against the base, and in brackets the upper end of the 95 % interval, from the same rows; "
    "minus means better than the base",
    drop,
)


@dataclass(frozen=True, slots=True)
class OutputMeasure:
    """One number of every output: its title and meaning, how it is read and shown, and the worst of several."""

    title: str
    meaning: str
    read: Callable[[OutputFidelity], float | None]
    show: Callable[[float | None], str]
    worst: Callable[[Iterable[float]], float]

    def cell(self, output: OutputFidelity) -> str:
        """That of one output."""
        return self.show(self.read(output))

    def column(self) -> Column:
        """That of the worst output of a variant."""
        return Column(self.title, self.meaning, self._worst_cell)

    def _worst_cell(self, measured: MeasuredArtifact) -> str:
        known = [value for output in measured.quality.outputs if (value := self.read(output)) is not None]
        return self.show(self.worst(known) if known else None)


BY_OUTPUT = (
    OutputMeasure(
        "agreement",
        "of classes the share of rows with the base's top class, of maps of classes that of places where the base has "
        "the class hit least, of embeddings the mean cosine, of values 1 - error",
        lambda output: output.agreement,
        share,
        min,
    ),
    OutputMeasure(
        "worst row",
        "agreement of the row that is farthest from the base's: shared probability of classes, share of places with "
        "the same class, cosine, or 1 - error",
        lambda output: output.worst_agreement,
        share,
        min,
    ),
    OutputMeasure(
        "KL, nats",
        "mean divergence of the class probabilities from the base's",
        lambda output: output.kl,
        divergence,
        max,
    ),
    OutputMeasure(
        "ranks",
        "Spearman correlation of the similarities between rows with those in the base: 1 keeps every order of "
        "neighbours",
        lambda output: output.rank_agreement,
        four_decimals,
        min,
    ),
    OutputMeasure(
        "error",
        "of values, root mean square error of the worst channel over its standard deviation in the base; of whole "
        "numbers, the share that differs",
        lambda output: output.error,
        share,
        max,
    ),
)
"""How near an output is to the base's. A variant is as near as its worst output."""
AGREEMENT, WORST, KL, RANKS, ERROR = (measure.column() for measure in BY_OUTPUT)
DEPENDENCE = Column(
    "mates",
    "largest change of an output by the rows that share its batch, relative to the largest output",
    lambda item: f"{item.quality.batch_dependence:.1g}",
)
SIZE = Column("size", "bytes on disk", lambda item: amount(item.quality.disk_bytes, "B"))
PARAMETERS = Column("params", "number of parameters", lambda item: amount(item.quality.parameters))
MACS = Column(
    "MACs",
    "multiply-accumulates per row, whatever their precision; a dash where they cannot be told",
    lambda item: amount(item.quality.macs) if item.quality.macs else "–",
)
THROUGHPUT = Column(
    "rows/s", "rows per second at the best of the measured batch sizes", lambda item: f"{item.quality.throughput:,.0f}"
)
GAIN = Column("gain", "throughput over that of the base", lambda item: ratio(item.gain))
RANGE = Column(
    "range",
    "the gain in the round that was worst for it, and in the best one",
    lambda item: f"{ratio(item.speedup.low)[:-1]}-{ratio(item.speedup.high)}",
)
OTHER_WORK = Column(
    "waited",
    "time that threads waited for a processor while it was timed, where other work on the machine may have changed it",
    lambda item: f"{item.quality.waited:.0%}" if item.quality.disturbed else ABSENT,
)
CHANGE = Column("brings", "what the pass brings over the step before it", lambda item: item.change or "")
MEMORY = Column(
    "memory",
    "peak resident memory that loading and running adds to the process",
    lambda item: amount(item.quality.peak_memory_bytes, "B"),
)
FITTING = Column(
    "rows that fit",
    "rows of the largest batch for which there is memory, where it is less than the largest that was tried",
    lambda item: ABSENT if item.quality.memory_rows is None else str(item.quality.memory_rows),
)
BUILD = Column(
    "build",
    "time to apply the passes, measuring excluded; passes that variants share are built once",
    lambda item: duration(item.seconds),
)

AT_WORST = (WORST, DEPENDENCE)
"""Of `ANSWERS`, those of a single row; a terminal has no room for all of them beside each other."""
ANSWERS = (SCORE, DROP, AGREEMENT, WORST, KL, RANKS, ERROR, DEPENDENCE)


def answers(measured: Sequence[MeasuredArtifact]) -> tuple[Column, ...]:
    """Whether variants still answer right; what was measured of none of them (no labels, no classes) has no column."""
    return tuple(column for column in ANSWERS if any(column.cell(item) != ABSENT for item in measured))


def by_output(measured: Sequence[MeasuredArtifact]) -> tuple[OutputMeasure, ...]:
    """What tells the outputs of variants apart; none where there is a single output, of which `answers` tells all."""
    outputs = [output for item in measured for output in item.quality.outputs]
    if all(len(item.quality.outputs) == 1 for item in measured):
        return ()
    return tuple(measure for measure in BY_OUTPUT if any(measure.read(output) is not None for output in outputs))


def speed(
    measured: Sequence[MeasuredArtifact], batches: Sequence[int], price: HourlyPrice | None = None
) -> tuple[Column, ...]:
    """How fast a variant is; latency at each of these batch sizes, other work only where it disturbed the timing."""
    disturbed = (OTHER_WORK,) if any(item.quality.disturbed for item in measured) else ()
    priced = () if price is None else (_per_million(price),)
    return (*map(_latency, batches), THROUGHPUT, GAIN, RANGE, *priced, *disturbed)


def _per_million(price: HourlyPrice) -> Column:
    return Column(
        f"{price.currency}/M",
        f"price of a million rows at that throughput, where an hour of the machine costs {price.amount:g} "
        f"{price.currency}",
        lambda item: money(price.per_million(item.quality)),
    )


def money(value: float) -> str:
    """A price with three significant digits."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def footprint(measured: Sequence[MeasuredArtifact]) -> tuple[Column, ...]:
    """What a variant takes besides time to answer; how many rows fit into memory only where that bounds one."""
    limit = (FITTING,) if any(FITTING.cell(item) != ABSENT for item in measured) else ()
    return (SIZE, PARAMETERS, MACS, MEMORY, *limit, BUILD)


def waterfall(measured: Sequence[MeasuredArtifact], batches: Sequence[int]) -> tuple[Column, ...]:
    """What each pass brought; latency at 8 rows, or at the batch size next to it."""
    quality = [column for column in answers(measured) if column in {SCORE, AGREEMENT, RANKS, ERROR}][:2]
    nearest = sorted(batches, key=lambda rows: (abs(rows - 8), rows))[:1]
    return (*quality, *map(_latency, nearest), GAIN, CHANGE, SIZE, BUILD)
