"""Ways to make one weight of several, tensor by tensor, in double precision.

`slerp` goes along the arc between two weights. The others add to the weights of a common ancestor what each model has
learned beyond it, its *task vector*: as it is (Ilharco et al., "Editing Models with Task Arithmetic", 2023), without
what is small or contradicts the majority (`ties`; Yadav et al., 2023), or thinned out at random and scaled up (`dare`;
Yu et al., "Language Models are Super Mario", 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

TaskMethod: TypeAlias = Literal["task_arithmetic", "ties", "dare"]
PARALLEL = 1e-6
"""Sine of an angle below which two weights have one direction, and the arc is a line."""


def slerp(one: Tensor, other: Tensor, share: float) -> Tensor:
    """The weight at `share` of the way from `one` to `other` along the arc between them (Shoemake 1985)."""
    a, b = one.double(), other.double()
    lengths = a.norm() * b.norm()
    cosine = ((a * b).sum() / lengths).clamp(-1, 1) if bool(lengths > 0) else torch.ones((), dtype=torch.float64)
    angle = cosine.arccos()
    if bool(angle.sin() < PARALLEL):
        return torch.lerp(a, b, share)
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()


def task_sum(method: TaskMethod, vectors: Sequence[Tensor], shares: Sequence[float], density: float) -> Tensor:
    """What is added to the ancestor: the task vectors (double precision), each with its share; `dare` draws at random
    from torch's global generator."""
    if method == "ties":
        return _ties(vectors, shares, density)
    if method == "dare":
        vectors = [vector * (torch.rand(vector.shape) < density) / density for vector in vectors]
    return torch.stack([vector * share for vector, share in zip(vectors, shares, strict=True)]).sum(0)


def _ties(vectors: Sequence[Tensor], shares: Sequence[float], density: float) -> Tensor:
    """Trim to the largest, elect the sign of the sum, and average those that have it."""
    trimmed = torch.stack([share * _largest(vector, density) for vector, share in zip(vectors, shares, strict=True)])
    agrees = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    weights = torch.tensor(shares, dtype=torch.float64).abs().reshape(-1, *([1] * vectors[0].ndim))
    total = (agrees * weights).sum(0)
    return torch.where(total > 0, (trimmed * agrees).sum(0) / total.clamp_min(1e-300), 0.0)


def _largest(vector: Tensor, density: float) -> Tensor:
    """The share `density` of the numbers, those of the largest size; the others are zero."""
    kept = max(1, round(density * vector.numel()))
    made = torch.zeros_like(vector).flatten()
    places = vector.abs().flatten().topk(kept).indices
    made[places] = vector.flatten()[places]
    return made.reshape(vector.shape)
