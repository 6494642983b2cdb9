"""How answers are scored against labels where the base brings no score of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from leanserve.comparison import row_cosines
from leanserve.contracts import Array, Arrays, ModelSpec, TensorSpec

ACCURACY = "accuracy"
"""What the share of rows with the right class is called; of no other score a row is right or wrong."""


class Scoring(NamedTuple):
    """How answers are scored."""

    name: str
    function: Callable[[Arrays, Array], float]
    """Of the outputs of some rows and of their labels; higher is better."""
    digest: str = ""
    """sha256 over what decides the number besides this version of ours: code of the user's own, options."""


def score_of(spec: ModelSpec, unit: int) -> Scoring:
    """How a model of these outputs is scored, of whose rows `unit` are labelled together."""
    if spec.labels:
        return Scoring(ACCURACY, partial(accuracy, output=spec.labelled))
    if unit == 2:
        embeddings = (index for index, item in enumerate(spec.outputs) if item.meaning == "embedding")
        return Scoring("rank correlation", partial(pair_correlation, output=next(embeddings, 0)))
    return Scoring("R squared", partial(determination, fields=spec.outputs))


def accuracy(outputs: Arrays, labels: Array, output: int = 0) -> float:
    """Top-1 accuracy of an output [N, classes] against class numbers [N], 0..1."""
    return float((outputs[output].argmax(axis=1) == labels).mean())


def determination(outputs: Arrays, labels: Array, fields: Sequence[TensorSpec]) -> float:
    """R squared, at most 1: the share of the labels' variance that the output which they fit explains.

    The mean over columns; one whose labels are all alike counts 1 where they are hit and else 0, and one with answers
    that are not finite 0.
    """
    [output] = regressed(fields, labels.shape[1:])
    wanted = np.asarray(labels, np.float64).reshape(len(labels), -1)
    given = np.asarray(outputs[output], np.float64).reshape(len(labels), -1)
    finite = np.isfinite(given).all(axis=0)
    missed = np.square(np.where(finite, given, wanted.mean(axis=0)) - wanted).sum(axis=0)
    spread = np.square(wanted - wanted.mean(axis=0)).sum(axis=0)
    explained = np.where(spread > 0, 1 - missed / np.where(spread > 0, spread, 1.0), missed == 0)
    return float(explained.mean())


def regressed(outputs: Sequence[TensorSpec], shape: tuple[int, ...]) -> list[int]:
    """Positions of the outputs of values that labels of this shape per row can be compared with."""
    return [
        index
        for index, item in enumerate(outputs)
        if item.meaning == "values" and item.dtype.startswith("float") and _squeezed(item.shape) == _squeezed(shape)
    ]


def pair_correlation(outputs: Arrays, labels: Array, output: int = 0) -> float:
    """Spearman's rank correlation between the cosine of pairs of embeddings and their labelled similarity, -1..1.

    Rows 2i and 2i + 1 of the embeddings [2N, D] are a pair; both carry its label.
    """
    return spearman(row_cosines(outputs[output][::2], outputs[output][1::2]), labels[::2])


def spearman(one: Array, other: Array) -> float:
    """Spearman's rank correlation of two lists (Spearman 1904), ties with their mean rank; 0 for a constant list."""
    from scipy.stats import spearmanr

    if any((np.asarray(values) == values[0]).all() for values in (one, other)):
        return 0.0  # no correlation is defined, and scipy warns
    return float(spearmanr(one, other).statistic)


def _squeezed(shape: Sequence[int | None]) -> list[int | None]:
    """Without axes of size 1, which a column of labels may have or not."""
    return [size for size in shape if size != 1]
