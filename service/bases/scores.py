"""How answers are scored against labels where the base brings no score of its own."""

from __future__ import annotations

import numpy as np

from service.comparison import row_cosines
from service.contracts import Array, Arrays


def accuracy(outputs: Arrays, labels: Array) -> float:
    """Top-1 accuracy of the logits [N, classes] against class numbers [N], 0..1."""
    return float((outputs[0].argmax(axis=1) == labels).mean())


def pair_correlation(outputs: Arrays, labels: Array) -> float:
    """Spearman's rank correlation between the cosine of pairs of embeddings and their labelled similarity, -1..1.

    Rows 2i and 2i + 1 of the embeddings [2N, D] are a pair; both carry its label.
    """
    return spearman(row_cosines(outputs[0][::2], outputs[0][1::2]), labels[::2])


def spearman(one: Array, other: Array) -> float:
    """Spearman's rank correlation of two lists (Spearman 1904), ties with their mean rank; 0 for a constant list."""
    ranks = [_ranks(np.asarray(values)) for values in (one, other)]
    spreads = [float(rank.std()) for rank in ranks]
    if 0.0 in spreads:
        return 0.0
    deviations = [rank - rank.mean() for rank in ranks]
    return float(np.mean(deviations[0] * deviations[1]) / (spreads[0] * spreads[1]))


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse])
