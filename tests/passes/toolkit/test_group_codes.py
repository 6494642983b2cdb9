"""Codes in groups: what they stand for, and that each way of choosing them lowers what it says it lowers."""

from __future__ import annotations

import numpy as np
import pytest

from leanserve.passes.toolkit.group_codes import HQQ_POWER, awq_scales, gptq, hqq, output_error, packed, rtn
from leanserve.passes.toolkit.histograms import Floats

RANDOM = np.random.default_rng(0)
WEIGHT: Floats = RANDOM.standard_t(4, (24, 72))
"""72 inputs: the last group of 32 is not full."""
INPUTS: Floats = RANDOM.standard_normal((400, 12)) @ RANDOM.standard_normal((12, 72))
INPUTS += 0.2 * RANDOM.standard_normal(INPUTS.shape)
INPUTS[:, :3] *= 20
MOMENTS: Floats = INPUTS.T @ INPUTS / len(INPUTS)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_the_nearest_code_is_at_most_half_a_step_away(bits: int) -> None:
    found = rtn(WEIGHT, bits, 32)
    assert found.codes.shape == (24, 3, 32)
    assert found.codes.max() == 2**bits - 1
    steps = found.steps.repeat(32, axis=1)[:, :72]
    # The zero is rounded too, which moves the ends of a range by half a step at most.
    assert (np.abs(found.weight(72) - WEIGHT) <= steps * 1.001).all()
    assert np.median(np.abs(found.weight(72) - WEIGHT) / steps) < 0.3


def test_what_is_zero_stays_zero_and_a_group_of_zeros_is_one() -> None:
    weight = WEIGHT.copy()
    weight[:, 32:64] = 0
    weight[3, 5] = 0
    found = rtn(weight, 4, 32).weight(72)
    assert not found[:, 32:64].any()
    assert found[3, 5] == 0


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_hqq_is_nearer_by_its_norm_and_never_farther_in_any_group(bits: int) -> None:
    def norms(weight: Floats) -> Floats:
        errors = np.abs(np.pad(weight - WEIGHT, ((0, 0), (0, 24)))).reshape(24, 3, 32)
        summed: Floats = (errors**HQQ_POWER).sum(-1)
        return summed

    plain, fitted = (norms(solve(WEIGHT, bits, 32).weight(72)) for solve in (rtn, hqq))
    assert (fitted <= plain * (1 + 1e-6)).all()
    assert fitted.sum() < 0.97 * plain.sum()


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_gptq_and_awq_lower_the_error_of_the_outputs(bits: int) -> None:
    plain = output_error(rtn(WEIGHT, bits, 32).weight(72) - WEIGHT, MOMENTS)
    made_up = output_error(gptq(WEIGHT, bits, 32, MOMENTS).weight(72) - WEIGHT, MOMENTS)
    scales = awq_scales([WEIGHT], bits, 32, MOMENTS, np.abs(INPUTS).mean(0))
    scaled = output_error(rtn(WEIGHT * scales, bits, 32).weight(72) / scales - WEIGHT, MOMENTS)
    assert made_up < 0.7 * plain
    assert scaled < 0.9 * plain


def test_gptq_with_inputs_that_say_nothing_of_each_other_is_rounding() -> None:
    found, plain = gptq(WEIGHT, 4, 32, np.eye(72)), rtn(WEIGHT, 4, 32)
    assert (found.codes == plain.codes).all()


def test_the_output_error_is_that_of_the_outputs() -> None:
    change = RANDOM.standard_normal(WEIGHT.shape)
    assert output_error(change, MOMENTS) == pytest.approx(((INPUTS @ change.T) ** 2).mean(0).sum(), rel=1e-4)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_packed_codes_lie_one_behind_another_from_the_lowest_bit(bits: int) -> None:
    codes = RANDOM.integers(0, 2**bits, (5, 8)).astype(np.uint8)
    got = packed(codes, bits)
    assert got.shape == (5, bits)
    whole = [int.from_bytes(row.tobytes(), "little") for row in got]
    assert [[number >> (bits * place) & (2**bits - 1) for place in range(8)] for number in whole] == codes.tolist()
