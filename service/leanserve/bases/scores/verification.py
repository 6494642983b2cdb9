"""Same or not the same: 1 - the equal error rate, at the threshold that misses as many as it lets pass by mistake."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from leanserve.contracts import Array


def equal_error_rate(scores: Array, genuine: NDArray[np.bool_]) -> float:
    """0..1, of scores [n] that are higher for the genuine; between two thresholds it is interpolated. NaN without both.

    Ties are passed or refused together.
    """
    order = np.argsort(-scores, kind="stable")
    scores, genuine = scores[order], genuine[order]
    positives, negatives = int(genuine.sum()), int((~genuine).sum())
    if not positives or not negatives:
        return float("nan")
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    missed = np.append(1.0, 1 - np.cumsum(genuine)[last] / positives)
    let_in = np.append(0.0, np.cumsum(~genuine)[last] / negatives)
    after = int(np.argmax(let_in >= missed))
    if after == 0:
        return float(missed[0])
    rise = np.array([let_in[after - 1] - missed[after - 1], let_in[after] - missed[after]])
    weight = -rise[0] / (rise[1] - rise[0])
    return float(missed[after - 1] + weight * (missed[after] - missed[after - 1]))


def all_pairs(embeddings: Array, identities: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Cosines of all pairs of rows [rows, D], and whether both have the same identity.

    A row is no pair with itself, nor with an exact copy, as it has where rows are drawn several times.
    """
    rows = np.asarray(embeddings, np.float64).reshape(len(embeddings), -1)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    first, second = np.triu_indices(len(rows), k=1)
    cosines, same = (unit @ unit.T)[first, second], identities[first] == identities[second]
    _, copies = np.unique(rows, axis=0, return_inverse=True)
    apart = copies.ravel()[first] != copies.ravel()[second]
    return cosines[apart], np.asarray(same[apart])
