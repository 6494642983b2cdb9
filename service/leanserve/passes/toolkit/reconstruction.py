"""Which weights of a layer can go with the least change of its outputs, seen from its inputs alone.

A layer is a matrix [outputs, features] here: a linear layer's weight, or a convolution's kernels laid flat. `wanda`
scores each weight by its size times the size of what it is multiplied with (Sun et al., "A Simple and Effective Pruning
Approach for Large Language Models", 2024). `sparse_gpt` removes columns one after another and lets the weights that
are left make up for it (Frantar and Alistarh, "SparseGPT", 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
"""Columns after which the weights behind them are corrected together, as in the paper."""
DAMPING = 0.01
"""Added to the diagonal of the second moments, as a share of their mean, as in the paper."""


@dataclass(frozen=True)
class Sparsity:
    """How much goes: a share of the weights or, with `group`, all but `keep` of that many neighbours in a row."""

    share: float
    keep: int = 0
    group: int = 0


def wanda(weight: Tensor, gram: Tensor, sparsity: Sparsity) -> Tensor:
    """The mask of a `weight` [outputs, features] whose inputs have the second moments `gram` [features, features].

    Every output loses the same share: outputs of one layer are not compared with each other.
    """
    scores = weight.abs().double() * gram.diagonal().clamp_min(0).sqrt()
    if sparsity.group:
        return _keep_of_each(scores, sparsity)
    mask = torch.ones_like(scores, dtype=torch.bool)
    gone = scores.argsort(dim=1, stable=True)[:, : round(sparsity.share * scores.shape[1])]
    return mask.scatter(1, gone, value=False)


def sparse_gpt(weight: Tensor, gram: Tensor, sparsity: Sparsity, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The corrected weight [outputs, features] and its mask; where `allowed` is `False` it stays zero in any case."""
    inverse = _inverse_factor(gram)
    left, mask = weight.double().masked_fill(gram.diagonal() == 0, 0), allowed.clone()
    for start in range(0, left.shape[1], BLOCK):
        end = min(start + BLOCK, left.shape[1])
        errors = torch.zeros_like(left[:, start:end])
        if not sparsity.group:
            costs = left[:, start:end].square() / inverse.diagonal()[start:end].square()
            mask[:, start:end] &= _without_lowest(costs.masked_fill(~allowed[:, start:end], -1), sparsity.share)
        for column in range(start, end):
            if sparsity.group and column % sparsity.group == 0:
                group = slice(column, column + sparsity.group)
                costs = left[:, group].square() / inverse.diagonal()[group].square()
                mask[:, group] &= _keep_of_each(costs.masked_fill(~allowed[:, group], -1), sparsity)
            kept = left[:, column] * mask[:, column]
            errors[:, column - start] = (left[:, column] - kept) / inverse[column, column]
            left[:, column + 1 : end] -= torch.outer(errors[:, column - start], inverse[column, column + 1 : end])
            left[:, column] = kept
        left[:, end:] -= errors @ inverse[start:end, end:]
    return left, mask


def _without_lowest(scores: Tensor, share: float) -> Tensor:
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().argsort(stable=True)[: round(share * scores.numel())]] = False
    return mask.reshape(scores.shape)


def _keep_of_each(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """The `keep` largest of every `group` neighbours; what is left over at the end of a row stays."""
    whole = scores.shape[1] - scores.shape[1] % sparsity.group
    groups = scores[:, :whole].reshape(len(scores), -1, sparsity.group)
    gone = groups.argsort(dim=2, stable=True)[..., : sparsity.group - sparsity.keep]
    mask = torch.ones_like(groups, dtype=torch.bool).scatter(2, gone, value=False).reshape(len(scores), whole)
    return torch.cat([mask, torch.ones_like(scores[:, whole:], dtype=torch.bool)], dim=1)


def _inverse_factor(gram: Tensor) -> Tensor:
    """Upper triangular U with `U^T U = (gram + damping)^-1`; what is always zero counts as of size 1, for damping."""
    damped = gram.double().clone()
    damped.diagonal()[damped.diagonal() == 0] = 1
    damped.diagonal().add_(DAMPING * float(damped.diagonal().mean()))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
