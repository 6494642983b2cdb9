"""A kernel as a sum of products of vectors (CANDECOMP/PARAFAC): by least squares of the weight, or of what it answers.

Each factor has a closed form while the others stand still (Harshman 1970; Lebedev et al., "Speeding-up Convolutional
Neural Networks Using Fine-tuned CP-Decomposition", 2015). The best approximation of a rank need not exist, and factors
then grow against each other without end; a small ridge keeps them finite. Errors of a weight that its inputs never show
cost nothing, and inputs of a convolution are correlated: measured by its answers, the same sum is several times nearer.
That measure has no closed form, so that all factors descend together, from where the weight alone has put them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SWEEPS = 60
RIDGE = 1e-6
"""As a share of the mean of the diagonal that it is added to."""
MODES = "nabc"
DESCENTS = 150
"""Iterations by the answers. Of a 64 x 64 x 3 x 3 kernel they take a second; 300 bring the error down by 2 % more."""


def cp_factors(kernel: Tensor, rank: int) -> list[Tensor]:
    """Factors [size, r], one for each dimension of a kernel [outputs, ...].

    The columns of a product have the same length in all of them, so that a training moves them alike. The same kernel
    gives the same factors. In double precision.
    """
    kernel = kernel.double()
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in kernel.shape]
    for _ in range(SWEEPS):
        for mode in range(kernel.ndim):
            factors[mode] = _solved(kernel, factors, mode)
            if mode < kernel.ndim - 1:  # the last one carries the length of all
                factors[mode] = factors[mode] / factors[mode].norm(dim=0).clamp_min(1e-30)
    return _balanced(factors)


def fitted_factors(kernel: Tensor, factors: Sequence[Tensor], moments: Tensor) -> list[Tensor]:
    """These factors of a kernel [outputs, ...], moved to where the answers to inputs of such `moments` differ least.

    `moments` [features, features] are the second ones of what an output position sees, whose features are the kernel's
    other dimensions laid flat. By L-BFGS in single precision (Liu and Nocedal 1989).
    """
    wanted, seen = kernel.flatten(1).float(), moments.float()
    moved = [factor.float().requires_grad_() for factor in factors]
    scale = max(float(((wanted @ seen) * wanted).sum()), 1e-30)
    descent = torch.optim.LBFGS(
        moved,
        max_iter=DESCENTS,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=0,
        tolerance_change=0,
    )

    def error() -> float:
        descent.zero_grad()
        off = wanted - moved[0] @ _products(moved[1:]).T
        pull = (off.detach() @ seen) / scale  # half of the gradient: one large product for value and gradient
        (2 * pull * off).sum().backward()  # type: ignore[no-untyped-call]
        return float((pull * off.detach()).sum())

    with torch.enable_grad():
        descent.step(error)  # type: ignore[no-untyped-call]
    return _balanced([factor.detach().double() for factor in moved])


def _products(factors: Sequence[Tensor]) -> Tensor:
    """Of all rows of the factors [size, r], in the order of a kernel laid flat: [features, r]."""
    made = factors[0]
    for factor in factors[1:]:
        made = (made[:, None] * factor).flatten(0, 1)
    return made


def _balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same products, with columns of one length."""
    lengths = [factor.norm(dim=0).clamp_min(1e-30) for factor in factors]
    common = torch.stack(lengths).log().mean(0).exp()
    return [factor * (common / length) for factor, length in zip(factors, lengths, strict=True)]


def _solved(kernel: Tensor, factors: list[Tensor], mode: int) -> Tensor:
    """The least-squares factor of a mode [size, rank], beside the others as they are."""
    modes = MODES[: kernel.ndim]
    others = [place for place in range(kernel.ndim) if place != mode]
    letters = ",".join(f"{modes[place]}r" for place in others)
    wanted = torch.einsum(f"{modes},{letters}->{modes[mode]}r", kernel, *(factors[place] for place in others))
    gram = torch.ones(wanted.shape[1], wanted.shape[1], dtype=torch.float64)
    for place in others:
        gram = gram * (factors[place].T @ factors[place])
    ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-30)
    factor: Tensor = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=torch.float64), wanted.T).T
    return factor
