"""Weights as codes of a few bits with a step and a zero per group, and four ways to choose them.

A group is a run of inputs of one output: `weight ~ (code - zero) * step`. Rounding to the nearest code (`rtn`) looks at
the weight alone, and so does `hqq`, which fits steps and zeros to a norm that forgives outliers (Badri and Shaji 2023,
"Half-Quadratic Quantization"). What a layer sees decides more: `gptq` rounds input by input and lets those to come make
up for the errors of those before (Frantar et al. 2022), `awq` makes the inputs that matter larger before they are
rounded (Lin et al. 2023). Both need no more of the data than the second moments of a layer's inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from leanserve.passes.toolkit.histograms import Floats

Codes: TypeAlias = NDArray[np.uint8]

DAMPING = 0.01
"""Added to the diagonal of second moments, as a share of their mean: the value of GPTQ's authors."""
HQQ_ROUNDS, HQQ_POWER, HQQ_SHARPNESS, HQQ_GROWTH = 20, 0.7, 10.0, 1.01
"""Of its authors: rounds, power of the norm, and how strongly outliers are held back, growing by round."""
AWQ_POWERS = tuple(power / 10 for power in range(11))
"""How much the magnitude of an input counts, from not at all."""


class Grouped(NamedTuple):
    """A weight [outputs, inputs] in groups: codes [outputs, groups, size], steps and zeros [outputs, groups].

    The inputs are filled up with zeros to whole groups.
    """

    codes: Codes
    steps: NDArray[np.float32]
    zeros: Codes

    def weight(self, inputs: int) -> Floats:
        """The float weight [outputs, inputs] that these codes stand for."""
        whole = (self.codes.astype(np.float64) - self.zeros[..., None]) * self.steps[..., None]
        return whole.reshape(len(whole), -1)[:, :inputs]


def rtn(weight: Floats, bits: int, size: int) -> Grouped:
    """The nearest code to each weight [outputs, inputs], over the range of its group."""
    groups = _in_groups(weight, size)
    steps, zeros = _spans(groups, bits)
    return Grouped(_nearest(groups, steps, zeros, bits), steps, zeros)


def hqq(weight: Floats, bits: int, size: int) -> Grouped:
    """Codes, steps and whole zeros of least |error| to the power `HQQ_POWER`; no data."""
    groups = _in_groups(weight, size)
    best = rtn(weight, bits, size)
    steps, zeros = best.steps.astype(np.float64), best.zeros.astype(np.float64)
    least = _norm(groups, best)
    sharpness = HQQ_SHARPNESS
    for _ in range(HQQ_ROUNDS):
        codes = _nearest(groups, steps, zeros, bits)
        errors = groups - (codes - zeros[..., None]) * steps[..., None]
        wanted = groups - _shrunk(errors, sharpness / np.maximum(_largest(groups), 1e-30)[..., None])
        steps, zeros = _fitted(codes.astype(np.float64), wanted, steps, zeros, bits)
        found = Grouped(_nearest(groups, steps, zeros, bits), steps.astype(np.float32), zeros.astype(np.uint8))
        norm = _norm(groups, found)
        better = norm < least
        best = _mixed(better, found, best)
        least, sharpness = np.minimum(norm, least), sharpness * HQQ_GROWTH
    return best


def gptq(weight: Floats, bits: int, size: int, moments: Floats) -> Grouped:
    """Codes of small output error: `moments` [inputs, inputs] are the mean outer products of what the layer sees."""
    groups = _in_groups(weight, size)
    outputs, count, _ = groups.shape
    left = np.ascontiguousarray(groups.reshape(outputs, -1).T)  # [inputs, outputs]
    inverse = _inverse_factor(moments, len(left))
    codes = np.zeros(left.shape, np.uint8)
    steps, zeros = np.zeros((outputs, count), np.float32), np.zeros((outputs, count), np.uint8)
    for group in range(count):
        start, end = group * size, (group + 1) * size
        step, zero = steps[:, group], zeros[:, group] = _spans(left[start:end].T, bits)
        errors = np.empty((size, outputs))
        for place, column in enumerate(range(start, end)):
            codes[column] = np.clip(np.rint(left[column] / step) + zero, 0, 2**bits - 1)
            errors[place] = (left[column] - (codes[column].astype(np.float64) - zero) * step) / inverse[column, column]
            left[column + 1 : end] -= np.outer(inverse[column, column + 1 : end], errors[place])
        left[end:] -= inverse[start:end, end:].T @ errors
    return Grouped(np.ascontiguousarray(codes.T).reshape(groups.shape), steps, zeros)


def awq_scales(weights: Sequence[Floats], bits: int, size: int, moments: Floats, magnitudes: Floats) -> Floats:
    """By what to multiply the inputs' weights before they are rounded, for layers that read the same tensor.

    `magnitudes` [inputs] are mean absolute values. The scales of least output error among powers of these.
    """
    usual = np.maximum(magnitudes, 1e-8)
    candidates = [usual**power for power in AWQ_POWERS]
    candidates = [np.clip(scales / np.sqrt(scales.max() * scales.min()), 1e-4, 1e4) for scales in candidates]

    def error(scales: Floats) -> float:
        return sum(
            output_error(rtn(weight * scales, bits, size).weight(len(scales)) / scales - weight, moments)
            for weight in weights
        )

    return min(candidates, key=error)


def output_error(difference: Floats, moments: Floats) -> float:
    """Mean squared change of a layer's outputs, summed over them, for a change of its weight [outputs, inputs]."""
    narrow = difference.astype(np.float32)
    return float(((narrow @ moments.astype(np.float32)) * narrow).sum(dtype=np.float64))


def packed(values: Codes, bits: int) -> Codes:
    """Codes [..., n] as bytes [..., n * bits / 8 rounded up], the first in the lowest bits."""
    single = np.unpackbits(values[..., None], axis=-1, count=bits, bitorder="little")
    flat: Codes = np.packbits(single.reshape(*values.shape[:-1], -1), axis=-1, bitorder="little")
    return flat


def _in_groups(weight: Floats, size: int) -> Floats:
    outputs, inputs = weight.shape
    padded = np.pad(weight.astype(np.float64), ((0, 0), (0, -inputs % size)))
    return padded.reshape(outputs, -1, size)


def _spans(groups: Floats, bits: int) -> tuple[NDArray[np.float32], Codes]:
    """Step and zero of each group [..., size], such that its range and 0 are covered."""
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    most = 2**bits - 1
    steps = np.where(high > low, (high - low) / most, 1).astype(np.float32)
    return steps, np.clip(np.rint(-low / steps), 0, most).astype(np.uint8)


def _nearest(groups: Floats, steps: NDArray[Any], zeros: NDArray[Any], bits: int) -> Codes:
    codes = np.rint(groups / steps[..., None]) + zeros[..., None]
    nearest: Codes = np.clip(codes, 0, 2**bits - 1).astype(np.uint8)
    return nearest


def _largest(groups: Floats) -> Floats:
    largest: Floats = np.abs(groups).max(-1)
    return largest


def _norm(groups: Floats, found: Grouped) -> Floats:
    errors = np.abs(groups - (found.codes - found.zeros[..., None].astype(np.float64)) * found.steps[..., None])
    norm: Floats = (errors**HQQ_POWER).sum(-1)
    return norm


def _shrunk(errors: Floats, sharpness: Floats) -> Floats:
    """The part of the errors that counts as outliers (generalised soft threshold)."""
    magnitude = np.abs(errors)
    threshold = np.power(np.maximum(magnitude, 1e-12), HQQ_POWER - 1) / sharpness
    shrunk: Floats = np.sign(errors) * np.maximum(magnitude - threshold, 0)
    return shrunk


def _fitted(codes: Floats, wanted: Floats, steps: Floats, zeros: Floats, bits: int) -> tuple[Floats, Floats]:
    """Whole zeros, then steps, of least squared error to what is wanted, for these codes."""
    zeros = np.clip(np.rint((codes - wanted / steps[..., None]).mean(-1)), 0, 2**bits - 1)
    centred = codes - zeros[..., None]
    square = (centred**2).sum(-1)
    fitted = (centred * wanted).sum(-1) / np.maximum(square, 1e-30)
    return np.where((square > 0) & (fitted > 0), fitted, steps), zeros


def _mixed(better: NDArray[np.bool_], one: Grouped, other: Grouped) -> Grouped:
    return Grouped(
        np.where(better[..., None], one.codes, other.codes),
        np.where(better, one.steps, other.steps),
        np.where(better, one.zeros, other.zeros),
    )


def _inverse_factor(moments: Floats, size: int) -> Floats:
    """Upper triangular U with `U^T U` the inverse of the damped moments; inputs that are padding stand for themselves.

    Raises:
        numpy.linalg.LinAlgError: they hold NaN or infinity.
    """
    known = len(moments)
    whole = np.eye(size)
    whole[:known, :known] = moments
    damping = max(DAMPING * float(np.diag(moments).mean()), 1e-12)
    whole[np.arange(known), np.arange(known)] += damping
    factor: Floats = np.linalg.cholesky(np.linalg.inv(whole)).T
    return factor
