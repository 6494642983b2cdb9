"""How many directions of a matrix are more than noise: the global analytic solution of variational Bayes.

Nakajima, Sugiyama, Babacan and Tomioka, "Global Analytic Solution of Fully-observed Variational Bayesian Matrix
Factorization", JMLR 2013: a matrix is a product of few factors and Gaussian noise of unknown variance. The variance is
that of the largest evidence; directions whose singular value lies above a threshold that follows from it are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

LARGE = 2.5129
"""Where the evidence of a direction begins to outweigh its price, by the root of the ratio of the sides (the paper's
equation 19 and what follows it)."""


def directions_above_noise(energies: Sequence[float], sides: tuple[int, int]) -> int:
    """The rank of a matrix with these squared singular values, of all of them, strongest first; at least 1."""
    short, long = sorted(sides)
    squares = np.maximum(np.asarray(energies[:short], np.float64), 1e-30)
    ratio = short / long
    edge = LARGE * math.sqrt(ratio)
    bound = (1 + edge) * (1 + ratio / edge)
    most = min(math.ceil(short / (1 + ratio)) - 1, len(squares) - 1)
    high = squares.sum() / (short * long)
    low = max(squares[most] / (long * bound), squares[most:].mean() / long)
    if low >= high:
        return 1
    found = minimize_scalar(
        lambda noise: _evidence_lost(squares / (long * math.exp(noise)), ratio, bound),
        bounds=(math.log(low), math.log(high)),
        method="bounded",
    )
    return max(1, int((squares > long * math.exp(found.x) * bound).sum()))


def _evidence_lost(x: NDArray[np.float64], ratio: float, bound: float) -> float:
    """Minus the logarithm of the evidence, up to a constant, of squared singular values in units of the noise (whose
    logarithm is part of theirs)."""
    loud, quiet = x[x > bound], x[x <= bound]
    shifted = loud - (1 + ratio)
    tau = 0.5 * (shifted + np.sqrt(np.maximum(shifted**2 - 4 * ratio, 0)))
    gain = loud - tau + np.log((tau + 1) / loud) + ratio * np.log(tau / ratio + 1)
    return float((quiet - np.log(quiet)).sum() + gain.sum())
