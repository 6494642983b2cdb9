"""What is known about an artifact: its recipe, the decisions that replay it, its measured quality and cost.

Manifests are JSON files beside the artifact's weights; the report, the gate, the metrics and the API read nothing else.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from leanserve.artifacts.benchmarks import QUIET, Change, RatioInterval
from leanserve.contracts import Json, Meaning, ModelSpec
from leanserve.hardware import Hardware


class OutputFidelity(BaseModel):
    """How near one output is to that of the base. What its meaning does not ask for is `None`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    meaning: Meaning
    agreement: float
    """0..1. Of classes: share of rows with the same best class (of independent ones, also the same classes at 0.5 or
    above); of maps of classes: share of places with the same best class, where the base has the class that is hit
    least; of embeddings: the mean cosine, 0 at least; of values: 1 - `error`, 0 at least."""
    agreement_low: float
    agreement_high: float
    """95 % confidence interval of the agreement: what other rows like these might have shown."""
    worst_agreement: float
    """0..1, that of the worst row. Of classes: the probability that both sides give to the same; of embeddings: the
    cosine; of maps of classes: the share of its places with the same class; of values: 1 - its error over all channels,
    each by its spread; of whole numbers: the share that is equal.
    """
    worst_row: int
    """That row of the gate split, from 0."""
    kl: float | None = None
    """Mean KL divergence (nats) of its probabilities of classes from the base's."""
    cosine: float | None = None
    """Mean cosine similarity of embeddings to those of the base."""
    rank_agreement: float | None = None
    """Whether embeddings are near to each other in the same order as in the base: Spearman's correlation between the
    cosine similarities of all pairs of rows here and there. `None` also with fewer than three rows."""
    error: float | None = None
    """Of values: root mean square error over the standard deviation of the base's, in the worst channel; of whole
    numbers: share of those that differ."""
    channel: int | None = None
    """The worst channel of values, or the class that is hit least, from 0; `None`: classes that are rare, or all."""
    not_finite: int
    """Numbers that are infinite or NaN here or in the base, and not the same in both."""
    constant: bool
    """Whether it is the same for every row, where that of the base is not."""


class Fidelity(BaseModel):
    """What one artifact answers on the gate split, and how large it is; measured in a fresh process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int
    """Rows of the gate split behind score and fidelity."""
    score: float | None
    """The base's own score (accuracy, R squared ...), higher is better; `None` where the data has no labels."""
    score_low: float | None
    score_high: float | None
    """95 % confidence interval of the score."""
    drop: float | None
    """Score that is lost against the base on the same rows; below 0 where it is better."""
    drop_low: float | None
    drop_high: float | None
    """95 % confidence interval of the drop, from the differences row by row."""
    agreement: float
    """That of the output that is farthest from the base's, 0..1."""
    outputs: tuple[OutputFidelity, ...]
    batch_dependence: float
    """Largest change of an output by the rows that share its batch, relative to its largest value; 0: none."""
    disk_bytes: int
    parameters: int
    macs: int
    """Multiply-accumulates per row of the structure, whatever their precision."""
    peak_memory_bytes: int
    """Resident memory that loading and running the artifact adds to a process that has imported its backend."""
    memory_rows: int | None = None
    """Rows of the largest batch for which there was memory; `None` where there was for the largest that was tried."""


class Quality(Fidelity):
    """Answers, size and speed of one artifact."""

    latency_ms: dict[int, float]
    """Median milliseconds per batch, by rows in the batch (1, 8, 32), the ratio to the base times the base's."""
    throughput: float
    """Rows per second at the best of these batch sizes."""
    speedup: float
    """Throughput over that of the base."""
    speedup_low: float
    speedup_high: float
    """The interval of the speedup, from the least and the largest ratio of its rounds."""
    rounds: int
    """Of measuring, behind these numbers."""
    waited: float
    """Time that threads waited for a processor while it was timed, over that of a turn, in the worst turn."""

    @property
    def disturbed(self) -> bool:
        """Whether other work on the machine may have changed its speed."""
        return self.waited > QUIET


class Recipe(BaseModel):
    """How one artifact was made: the last pass (`kind`) on the artifacts `parents`; `kind` is `None` for the base."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    parents: tuple[str, ...]
    base: str
    kind: str | None
    options: dict[str, Json]
    decisions: dict[str, Json]
    facts: dict[str, float]
    simulated: bool
    format: str | None
    """Of the model that is saved here. `None` where the pass acts at load time only, on the last one saved before."""
    spec: ModelSpec
    """What the model takes and gives after this pass."""
    files: dict[str, str]
    """Place in the artifact's folder -> sha256: what the format saved, and what the pass brought besides."""
    parameters: int
    macs: int
    seconds: float
    """Wall-clock seconds of `apply`, measuring excluded."""
    versions: dict[str, str]
    hardware: Hardware
    """On which it was made."""


class Measurement(BaseModel):
    """Answers of an artifact and the machine on which they were computed; repeated on another machine if possible."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fidelity: Fidelity
    score_digest: str
    """Of the score by which answers were scored (`contracts.Base.score_digest`)."""
    cpu: str
    """What computed them (`Hardware.machine`)."""
    threads: int


class Manifest(Recipe):
    """One artifact, whole: how it was made and what it is worth here."""

    quality: Quality
    cpu: str
    """What it was measured on (`Hardware.machine`)."""
    threads: int
    ratios: dict[int, RatioInterval] = {}
    """Latency over that of the base, by rows in the batch, with the range of the rounds."""
    change: Change | None = None
    """Its throughput beside that of its parent: what the last pass brought. `None`: of the base, and of what joins."""


class Failure(BaseModel):
    """Why a pass could not be applied, in the place of the artifact that it should have made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reason: str


class VariantReport(BaseModel):
    """A variant as the report shows it: all that it is made of, and the gate's word.

    Of a variant that could not be made (`built` is false) the ancestry is the base alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    state: Literal["serving", "excluded"]
    reason: str | None
    """Why the gate excluded it, or why it could not be made."""
    doubt: str | None = None
    """What the gate could not decide with the rows there are, of a variant that it let pass."""
    parents: tuple[str, ...] = ()
    """The variants that it is made of, as configured; none: the base."""
    ancestry: tuple[Manifest, ...]
    """Every artifact that it is made of, in building order: the base first, its last pass last."""
    built: bool = True

    @property
    def spec(self) -> ModelSpec:
        """What the finished variant takes and gives; passes may have changed what the base does."""
        return self.ancestry[-1].spec

    @property
    def quality(self) -> Quality:
        """Quality of the finished variant."""
        return self.ancestry[-1].quality
