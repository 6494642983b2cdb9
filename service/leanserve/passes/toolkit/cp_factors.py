"""A kernel as a sum of products of four vectors: CANDECOMP/PARAFAC by alternating least squares.

Each of the four factors has a closed form while the other three stand still (Harshman 1970; Lebedev et al.,
"Speeding-up Convolutional Neural Networks Using Fine-tuned CP-Decomposition", 2015). The best approximation of a rank
need not exist, and factors then grow against each other without end; a small ridge keeps them finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

SWEEPS = 60
RIDGE = 1e-6
"""As a share of the mean of the diagonal that it is added to."""
MODES = "ncvh"


def cp_factors(kernel: Tensor, rank: int) -> list[Tensor]:
    """Factors [outputs, r], [inputs, r], [height, r] and [width, r] of a kernel [outputs, inputs, height, width].

    The columns of a product have the same length in all four, so that a training moves them alike. The same kernel
    gives the same factors. In double precision.
    """
    kernel = kernel.double()
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in kernel.shape]
    for _ in range(SWEEPS):
        for mode in range(4):
            factors[mode] = _solved(kernel, factors, mode)
            if mode < 3:  # the last one carries the length of all
                factors[mode] = factors[mode] / factors[mode].norm(dim=0).clamp_min(1e-30)
    share = factors[3].norm(dim=0).clamp_min(1e-30) ** 0.25
    return [*(factor * share for factor in factors[:3]), factors[3] / share**3]


def _solved(kernel: Tensor, factors: list[Tensor], mode: int) -> Tensor:
    """The least-squares factor of a mode [size, rank], beside the others as they are."""
    others = [place for place in range(4) if place != mode]
    letters = ",".join(f"{MODES[place]}r" for place in others)
    wanted = torch.einsum(f"{MODES},{letters}->{MODES[mode]}r", kernel, *(factors[place] for place in others))
    gram = torch.ones(wanted.shape[1], wanted.shape[1], dtype=torch.float64)
    for place in others:
        gram = gram * (factors[place].T @ factors[place])
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-30)
    factor: Tensor = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=torch.float64), wanted.T).T
    return factor
