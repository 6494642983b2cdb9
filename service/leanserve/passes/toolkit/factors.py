"""The linear algebra under the low-rank passes: the few directions that carry most of a weight's output.

A weight is split as `matrix ~ encode @ decode @ matrix` with `encode` [d, r] and `decode` [r, d]. Without data this
minimises the error of the weight (Eckart and Young, 1936). With data it minimises the error of the *output*: the rows
are first multiplied by a factor of the input's second moments, which turns output error into weight error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from leanserve.errors import PassFailed

DAMPING = 1e-6
"""Added to the diagonal of second moments, as a share of their mean: dead inputs must not make them singular."""


@dataclass(frozen=True)
class Basis:
    """Directions of a space of `d` dimensions, strongest first, in double precision.

    `encode` [d, m] maps onto the directions, `decode` [m, d] is its left inverse, and `energies` [m] are the squared
    singular values.
    """

    encode: Tensor
    decode: Tensor
    energies: Tensor


def input_basis(matrix: Tensor, scale: Tensor | None = None) -> Basis:
    """Directions of the inputs of `x -> matrix.T @ x` for a `matrix` [d, n].

    `scale` [d, d] is a factor S of the inputs' second moments, `E[x x^T] = S S^T` (identity if not given): truncation
    to r directions then loses the least output energy that any rank r can lose.

    Of the scaled matrix the left singular vectors alone are wanted. They are the eigenvectors of its outer product,
    which take a fraction of the time of a singular value decomposition; what that rounds, directions of less than 1e-8
    of the largest singular value, is no loss to anybody.
    """
    scaled = matrix.double() if scale is None else scale.T @ matrix.double()
    energies, left = torch.linalg.eigh(scaled @ scaled.T)
    most = min(scaled.shape)
    energies, left = energies.flip(0)[:most].clamp_min(0), left.flip(1)[:, :most]
    if scale is None:
        return Basis(left, left.T, energies)
    return Basis(torch.linalg.solve_triangular(scale.T, left, upper=True), left.T @ scale.T, energies)


def output_basis(covariance: Tensor) -> Basis:
    """Principal directions of outputs with this covariance [d, d]."""
    values, vectors = torch.linalg.eigh(covariance.double())
    vectors = vectors.flip(1)
    return Basis(vectors, vectors.T, values.flip(0).clamp_min(0))


def cholesky_scale(moments: Tensor) -> Tensor:
    """Lower triangular S with `S S^T = moments` [d, d], damped until it exists.

    Fewer calibration rows than dimensions leave the moments singular, and rounding may make them slightly indefinite.

    Raises:
        PassFailed: they are infinite or NaN, which no damping cures.
    """
    if not bool(moments.isfinite().all()):
        raise PassFailed("targets: a layer sees or gives infinities or NaN on the calibration rows; exclude it")
    damping = max(DAMPING * float(moments.diagonal().mean()), 1e-12)
    unit = torch.eye(len(moments), dtype=torch.float64)
    while True:
        scale, failed = torch.linalg.cholesky_ex(moments.double() + damping * unit)
        if not failed:
            return cast("Tensor", scale)
        damping *= 10


def regress(moments: Tensor, features: int) -> Tensor:
    """Least-squares map [features, targets] from the joint covariance of features and targets [f + t, f + t]."""
    scale = cholesky_scale(moments[:features, :features])
    return torch.cholesky_solve(moments[:features, features:].double(), scale)
