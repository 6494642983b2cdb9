"""Maps of classes: mean intersection over union, summed over all rows (the measure of PASCAL VOC; Everingham 2010)."""

from __future__ import annotations

import numpy as np

from leanserve.contracts import Array
from leanserve.errors import PassFailed


def mean_intersection_over_union(answers: Array, labels: Array, ignored: int | None) -> float:
    """0..1: the mean over all classes that are labelled or answered.

    `labels` [rows, ...] are class numbers; those that are `ignored`, or below 0, do not count. `answers` are class
    numbers of the same shape, or numbers per class with one axis more, of which the largest is the answer.

    Raises:
        PassFailed: the shapes do not fit.
    """
    found = class_map(answers, labels.shape)
    counted = (labels >= 0) & (labels != (-1 if ignored is None else ignored))
    found, wanted = found[counted].astype(np.int64), labels[counted].astype(np.int64)
    if not len(wanted):
        return float("nan")
    classes = int(max(found.max(), wanted.max())) + 1
    pairs = np.bincount(classes * wanted + found, minlength=classes**2).reshape(classes, classes)
    union = pairs.sum(axis=0) + pairs.sum(axis=1) - pairs.diagonal()
    return float((pairs.diagonal()[union > 0] / union[union > 0]).mean())


def class_map(answers: Array, shape: tuple[int, ...]) -> Array:
    """Class numbers of this shape, that of the labels."""
    if answers.shape == shape:
        return answers
    for axis in range(1, answers.ndim):
        if answers.shape[:axis] + answers.shape[axis + 1 :] == shape:
            return np.asarray(np.where(np.isnan(answers), -np.inf, answers).argmax(axis=axis))
    raise PassFailed(
        f"score: answers {list(answers.shape)} are no class numbers of the labels' shape {list(shape)}, and no numbers "
        "per class, which have one axis more"
    )
