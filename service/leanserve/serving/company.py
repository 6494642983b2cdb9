"""Which requests may share a batch: those that have the same *company*, a value that is computed from their rows.

Nearly always any may. Where rows of different length change each other's answers, the company is their shape. Where a
variant was measured to have its rows change each other, as one scale for a whole batch does, a request that holds NaN
or infinity has a company of its own: it would turn the answers of all others into NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np

from leanserve.contracts import Arrays, ModelSpec

Company = Callable[[Arrays], Hashable]
ANY: Hashable = ()
"""The company of requests that may share a batch with all others."""


def company_by(spec: ModelSpec, *, trusts_rows: bool) -> Company | None:
    """What tells the company of a request; `None` where any may share a batch.

    `trusts_rows`: whether the variant was measured to keep the rows of a batch apart, whatever their values.
    """
    if spec.rows == "one":
        return None
    alike = _shape if spec.rows == "one_length" else None
    if trusts_rows or not any(item.dtype.startswith("float") for item in spec.inputs):
        return alike
    return lambda sample: (alike(sample) if alike else ANY) if _finite(sample) else object()


def _shape(sample: Arrays) -> Hashable:
    return tuple(array.shape[1:] for array in sample)


def _finite(sample: Arrays) -> bool:
    return all(array.dtype.kind != "f" or bool(np.isfinite(array).all()) for array in sample)
