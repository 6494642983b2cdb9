"""Do two variants answer the same rows alike? Each output by what it means, in sums that may be added up.

A shadow answers what the base has answered already, so every row is a pair, and a difference is the variant's own: no
randomness of who asked what. The sums are bounded, however long an experiment lasts, and adding them up is exact in any
order for all counts (means up to rounding), over batches, processes and restarts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from leanserve.comparison import (
    UNLIKE,
    ClassRows,
    best_classes,
    class_divergence,
    compared,
    differ_in_kind,
    row_cosines,
    same_classes,
)
from leanserve.contracts import CLASS_MAPS, CLASSES, Array, Arrays, Json, Meaning, TensorSpec
from leanserve.experiments.interval import Interval
from leanserve.experiments.mean import MeanSums
from leanserve.experiments.proportion import Numbers, share_interval
from leanserve.texts import as_numbers

MOST_CLASSES = 1024
"""Classes that are counted apart; all others are counted together, as `other`."""
TOP = 5
"""Best classes, or nearest neighbours, whose overlap is counted; at most half of them all."""
WHOLE = "biu"
"""Kinds of numpy dtypes that are compared by equality, as texts are."""


@dataclass(frozen=True, slots=True)
class AgreementRule:
    """From where on two answers count as the same, where they are not classes."""

    min_cosine: float = 0.99
    """Of embeddings."""
    min_places: float = 0.98
    """Of maps of classes: the share of a row's places with the same best class."""
    max_error: float = 0.05
    """Of values: the largest difference in a row, relative to `scales`."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """Spread of the base's values by name of the output; else the largest absolute value of its row."""


class RowDifferences(NamedTuple):
    """What was found for each row of one output [rows]; what its meaning does not ask for is NaN."""

    agreed: NDArray[np.bool_]
    broken: NDArray[np.bool_]
    """Whether ours is NaN or infinite where theirs is something else."""
    max_abs: Numbers
    kl: Numbers
    cosine: Numbers
    overlap: Numbers
    """Share of the best classes, of the places of a map with the same one, or of the nearest other rows of embeddings,
    that both have."""
    classes: Sequence[str]
    """Their best class; empty for what is no output of classes."""


_Found = dict[str, Any]


def row_differences(ours: Array, theirs: Array, field: TensorSpec, rule: AgreementRule) -> RowDifferences:
    """Compare one output [rows, ...] of a candidate (ours) with that of the base (theirs) for the same rows."""
    ours, theirs = as_numbers(ours, theirs)
    one, other = ours.reshape(len(ours), -1), theirs.reshape(len(theirs), -1)
    pair, unknown = compared(one, other), np.full(len(ours), np.nan)
    furthest = np.abs(pair.one - pair.other).max(axis=1, initial=0.0)
    found: _Found = {
        "broken": (differ_in_kind(one, other) & ~np.isfinite(one)).any(axis=1),
        "max_abs": np.where(pair.unlike.any(axis=1), UNLIKE, furthest),
        "kl": unknown,
        "cosine": unknown,
        "overlap": unknown,
        "classes": (),
    }
    measure = _equal if theirs.dtype.kind in WHOLE else MEASURES_OF_ROWS[field.meaning]
    return RowDifferences(**found | measure(one, other, field, rule))


def _equal(ours: Array, theirs: Array, _: TensorSpec, __: AgreementRule) -> _Found:
    """No index is nearly right."""
    return {"agreed": (ours == theirs).all(axis=1)}


def _classes(ours: Array, theirs: Array, field: TensorSpec, _: AgreementRule) -> _Found:
    rows = ClassRows.of(ours, theirs)
    kl = np.full(len(ours), np.nan)
    kl[rows.known] = np.maximum(0.0, class_divergence(rows, field.meaning))
    best = (str(index) if index < MOST_CLASSES else "other" for index in theirs.argmax(axis=1))
    agreed = same_classes(rows, ours, theirs, field.meaning)
    return {"agreed": agreed, "kl": kl, "overlap": _overlap(ours, theirs), "classes": tuple(best)}


def _class_map(ours: Array, theirs: Array, field: TensorSpec, rule: AgreementRule) -> _Found:
    same = (best_classes(ours, field) == best_classes(theirs, field)).mean(axis=1)
    return {"agreed": same >= rule.min_places, "overlap": same}


def _embeddings(ours: Array, theirs: Array, _: TensorSpec, rule: AgreementRule) -> _Found:
    cosine = row_cosines(ours, theirs)
    overlap = _overlap(_similarities(ours), _similarities(theirs)) if len(ours) > 2 else np.full(len(ours), np.nan)
    return {"agreed": cosine >= rule.min_cosine, "cosine": cosine, "overlap": overlap}


def _similarities(rows: Array) -> Numbers:
    """Cosines of each row with all others of its batch [rows, rows - 1]."""
    finite = np.where(np.isfinite(rows), rows, 0.0).astype(np.float64)
    unit = finite / np.maximum(np.linalg.norm(finite, axis=1, keepdims=True), 1e-12)
    others = ~np.eye(len(rows), dtype=bool)
    return np.asarray((unit @ unit.T)[others].reshape(len(rows), -1))


def _overlap(ours: Array, theirs: Array) -> Numbers:
    """Share of the positions of the largest numbers of each row that both sides have; of equal numbers the first."""
    kept = max(1, min(TOP, ours.shape[1] // 2))
    one, other = (
        np.argsort(-np.asarray(array, np.float64), axis=1, kind="stable")[:, :kept] for array in (ours, theirs)
    )
    return np.asarray((one[:, :, None] == other[:, None, :]).any(axis=2).mean(axis=1))


def _values(ours: Array, theirs: Array, field: TensorSpec, rule: AgreementRule) -> _Found:
    pair = compared(ours, theirs)
    furthest = np.abs(pair.one - pair.other).max(axis=1, initial=0.0)
    scale = rule.scales.get(field.name) or np.abs(pair.other).max(axis=1, initial=0.0)
    return {"agreed": (furthest <= rule.max_error * scale) & ~pair.unlike.any(axis=1)}


MEASURES_OF_ROWS: Final[Mapping[Meaning, Callable[[Array, Array, TensorSpec, AgreementRule], _Found]]] = {
    **dict.fromkeys(CLASSES, _classes),
    **dict.fromkeys(CLASS_MAPS, _class_map),
    "embedding": _embeddings,
    "values": _values,
}
"""By what an output means. Whole numbers are compared as such, whatever they mean."""


class Agreed(NamedTuple):
    """Rows of some kind, and how many of them had the same answer."""

    rows: int = 0
    agreed: int = 0


Slices = Mapping[str, Agreed]


@dataclass(frozen=True, slots=True)
class OutputPairs:
    """Sums over the compared rows of one output."""

    rows: int = 0
    agreed: int = 0
    broken: int = 0
    max_abs: float = 0.0
    kl: MeanSums = field(default_factory=MeanSums)
    cosine: MeanSums = field(default_factory=MeanSums)
    overlap: MeanSums = field(default_factory=MeanSums)
    classes: Slices = field(default_factory=dict)
    """By the base's best class."""

    @classmethod
    def of(cls, found: RowDifferences) -> Self:
        """Those of the rows of one comparison."""
        kl, cosine, overlap = (
            MeanSums.of(values[np.isfinite(values)]) for values in (found.kl, found.cosine, found.overlap)
        )
        counts = len(found.agreed), int(found.agreed.sum()), int(found.broken.sum())
        furthest = float(found.max_abs.max(initial=0.0))
        return cls(*counts, furthest, kl, cosine, overlap, _sliced(found.classes, found.agreed))

    def merged(self, other: OutputPairs) -> OutputPairs:
        """Those of both together."""
        return OutputPairs(
            self.rows + other.rows,
            self.agreed + other.agreed,
            self.broken + other.broken,
            max(self.max_abs, other.max_abs),
            self.kl.merged(other.kl),
            self.cosine.merged(other.cosine),
            self.overlap.merged(other.overlap),
            _merged(self.classes, other.classes),
        )


@dataclass(frozen=True, slots=True)
class AnswerPairs:
    """Sums over all rows that a candidate answered after the base. A row agrees if all of its outputs do."""

    rows: float = 0
    agreed: float = 0
    broken: float = 0
    """Rows with a number that is NaN or infinite, and something else in the base's answer."""
    outputs: Mapping[str, OutputPairs] = field(default_factory=dict)
    lengths: Slices = field(default_factory=dict)
    """By the length of the input, up to the next power of two; empty where lengths cannot differ."""

    def merged(self, other: AnswerPairs) -> AnswerPairs:
        """Those of both together."""
        names = [*self.outputs, *(name for name in other.outputs if name not in self.outputs)]
        none = OutputPairs()
        outputs = {name: self.outputs.get(name, none).merged(other.outputs.get(name, none)) for name in names}
        counts = self.rows + other.rows, self.agreed + other.agreed, self.broken + other.broken
        return AnswerPairs(*counts, outputs, _merged(self.lengths, other.lengths))

    def scaled(self, factor: float) -> AnswerPairs:
        """The counts of `factor` times as many rows of the same kind, without outputs and slices."""
        return AnswerPairs(self.rows * factor, self.agreed * factor, self.broken * factor)

    def to_json(self) -> Json:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Json]) -> Self:
        """Of what `to_json` made, also when it went through JSON."""
        outputs = {name: _output_pairs(each) for name, each in stored["outputs"].items()}
        return cls(**{**stored, "outputs": outputs, "lengths": _slices(stored["lengths"])})


class PairedRows(NamedTuple):
    """One comparison: the sums over its rows, what was found by output, and the rows whose answers differ."""

    sums: AnswerPairs
    found: Mapping[str, RowDifferences]
    disagreed: tuple[int, ...]


def pair_answers(
    ours: Arrays, theirs: Arrays, fields: Sequence[TensorSpec], rule: AgreementRule, lengths: Sequence[int] = ()
) -> PairedRows:
    """Compare a candidate's answers (ours) with the base's (theirs): outputs [rows, ...] in the order of `fields`.

    `lengths` [rows] are those of the inputs, where they can differ.
    """
    each = zip(fields, ours, theirs, strict=True)
    found = {field.name: row_differences(one, other, field, rule) for field, one, other in each}
    agreed = np.logical_and.reduce([item.agreed for item in found.values()])
    broken = np.logical_or.reduce([item.broken for item in found.values()])
    outputs = {name: OutputPairs.of(item) for name, item in found.items()}
    slices = _sliced([f"<= {1 << max(0, length - 1).bit_length()}" for length in lengths], agreed)
    sums = AnswerPairs(len(agreed), int(agreed.sum()), int(broken.sum()), outputs, slices)
    return PairedRows(sums, found, tuple(int(row) for row in np.flatnonzero(~agreed)))


def weakest_slices(slices: Slices, alpha: float) -> list[tuple[str, float, Interval]]:
    """Name, share and interval of agreement by slice, the one that can have the least agreement first.

    All intervals hold at once with probability 1 - alpha, however many slices there are.
    """
    level = alpha / max(1, len(slices))
    found = [
        (name, item.agreed / item.rows, share_interval(item.agreed, item.rows - item.agreed, level))
        for name, item in slices.items()
        if item.rows
    ]
    return sorted(found, key=lambda item: (item[2].high, math.fsum(item[2])))


def _sliced(names: Sequence[str], agreed: NDArray[np.bool_]) -> Slices:
    slices: dict[str, Agreed] = {}
    for name, same in zip(names, agreed[: len(names)], strict=True):
        before = slices.get(name, Agreed())
        slices[name] = Agreed(before.rows + 1, before.agreed + int(same))
    return slices


def _merged(one: Slices, other: Slices) -> Slices:
    none = Agreed()
    return {
        name: Agreed(*map(sum, zip(one.get(name, none), other.get(name, none), strict=True)))
        for name in sorted({*one, *other})
    }


def _slices(stored: Mapping[str, Sequence[int]]) -> Slices:
    return {name: Agreed(*counts) for name, counts in stored.items()}


def _output_pairs(stored: Mapping[str, Json]) -> OutputPairs:
    means = {name: MeanSums(**stored[name]) for name in ("kl", "cosine", "overlap")}
    return OutputPairs(**{**stored, **means, "classes": _slices(stored["classes"])})
