"""Boxes: mean average precision, as COCO has it (Lin et al. 2014; the definition is that of its evaluation server).

Detections of all rows are sorted by their score. In this order each takes the labelled box of its row and class that it
overlaps most, if that is by at least the threshold and no better one has it. The average precision of a class is the
mean, over 101 recalls from 0 to 1, of the best precision that has at least this recall; the score is its mean over the
classes that are labelled and over the thresholds. Of a row the 100 best detections count. Sizes of boxes and crowds,
which COCO reports apart, make no difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from leanserve.contracts import Array

MOST_DETECTIONS = 100
"""Of a row."""
RECALLS = 101


class Detections(NamedTuple):
    """What a detector answers: boxes [rows, detections, 4] as x1, y1, x2, y2; scores and classes [rows, detections]."""

    boxes: Array
    scores: Array
    classes: Array

    @classmethod
    def of(cls, boxes: Array, scores: Array, classes: Array | None) -> Detections:
        """`scores` may have one number per class, [rows, detections, classes]: then the best one counts."""
        if scores.ndim == 3:
            classes = scores.argmax(axis=2) if classes is None else classes
            scores = scores.max(axis=2)
        return cls(boxes, scores, np.zeros(scores.shape) if classes is None else np.asarray(classes))


def mean_average_precision(found: Detections, labels: Array, thresholds: Sequence[float]) -> float:
    """0..1; NaN where no box is labelled.

    `labels` [rows, boxes, 5] are class, x1, y1, x2, y2 in the coordinates of the answers; a class below 0 is no box.
    """
    wanted = np.unique(labels[..., 0][labels[..., 0] >= 0])
    levels = np.asarray(thresholds, np.float64)
    precisions = [_average_precision(found, labels, number, levels) for number in wanted]
    return float(np.mean(precisions)) if precisions else float("nan")


def _average_precision(found: Detections, labels: Array, number: float, levels: Array) -> float:
    """Of one class, the mean over all thresholds."""
    scores, hits, count = [np.zeros(0)], [np.zeros((len(levels), 0), bool)], 0
    for boxes, ranked, target in _rows_of_class(found, labels, number):
        count += len(target)
        scores.append(ranked)
        hits.append(_hits(boxes, target, levels))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    right = np.cumsum(np.concatenate(hits, axis=1)[:, order], axis=1)
    precision = right / np.arange(1, right.shape[1] + 1)
    best_from_here = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    return float(np.mean([_at_recalls(*each) for each in zip(right / count, best_from_here, strict=True)]))


def _at_recalls(recall: Array, precision: Array) -> float:
    """Mean precision at `RECALLS` from 0 to 1; 0 at those that are not reached."""
    places = np.searchsorted(recall, np.linspace(0, 1, RECALLS) - 1e-12)
    return float(np.append(precision, 0.0)[places].mean())


def _rows_of_class(found: Detections, labels: Array, number: float) -> Iterator[tuple[Array, Array, Array]]:
    """Of every row: boxes and scores of its best detections of a class, best first, and the labelled boxes."""
    for boxes, scores, classes, wanted in zip(*found, labels, strict=True):
        usable = np.isfinite(scores)
        best = np.argsort(np.where(usable, -scores, np.inf), kind="stable")[:MOST_DETECTIONS]
        best = best[usable[best] & (classes[best] == number)]
        yield boxes[best], scores[best], wanted[wanted[:, 0] == number][:, 1:]


def _hits(boxes: Array, target: Array, levels: Array) -> Array:
    """Which boxes, best first, hit a labelled one that no better box has: bool [thresholds, boxes]."""
    hit = np.zeros((len(levels), len(boxes)), bool)
    overlaps = overlap(boxes, target)
    taken = np.zeros((len(levels), len(target)), bool)
    every = np.arange(len(levels))
    for place in np.flatnonzero((overlaps >= levels.min()).any(axis=1)):
        able = np.where(taken, -1.0, overlaps[place])
        chosen = able.argmax(axis=1)
        hit[:, place] = able[every, chosen] >= levels
        taken[every, chosen] |= hit[:, place]
    return hit


def overlap(one: Array, other: Array) -> Array:
    """Intersection over union of boxes [n, 4] with others [m, 4], as x1, y1, x2, y2: [n, m]; 0 for empty boxes."""
    one, other = (np.asarray(boxes, np.float64) for boxes in (one, other))
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0.0, None), axis=2)
    areas = [np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0.0, None), axis=1) for boxes in (one, other)]
    union = areas[0][:, None] + areas[1][None, :] - shared
    return np.asarray(np.where(union > 0, shared / np.where(union > 0, union, 1.0), 0.0))
