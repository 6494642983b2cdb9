"""Which requests share a batch: by their shape, and by whether their numbers are finite."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from leanserve.contracts import Arrays, ModelSpec, TensorSpec
from leanserve.serving.company import company_by

FLOATS = ModelSpec((TensorSpec("x", "float32", (None, 2)), TensorSpec("n", "int64", ())), ())
TOKENS = ModelSpec((TensorSpec("ids", "int64", (None,)),), ())


def sample(length: int, value: float = 1.0) -> Arrays:
    array = np.ones((1, length, 2), np.float32)
    array[0, -1, 0] = value
    return array, np.zeros(1, np.int64)


def test_any_rows_share_a_batch_of_a_variant_that_keeps_them_apart() -> None:
    assert company_by(FLOATS, trusts_rows=True) is None
    assert company_by(TOKENS, trusts_rows=False) is None, "whole numbers are finite"
    assert company_by(replace(FLOATS, rows="one"), trusts_rows=False) is None, "there is no company to ruin"


def test_rows_of_one_length_are_those_of_one_shape() -> None:
    company = company_by(replace(FLOATS, rows="one_length"), trusts_rows=True)
    assert company is not None
    assert company(sample(3)) == company(sample(3, np.nan)) != company(sample(4))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_alone_in_a_variant_that_mixes_rows(value: float) -> None:
    for rows in ("any", "one_length"):
        company = company_by(replace(FLOATS, rows=rows), trusts_rows=False)
        assert company is not None
        assert company(sample(3)) == company(sample(3, 1e30))
        assert len({company(sample(3, value)), company(sample(3, value)), company(sample(3))}) == 3
