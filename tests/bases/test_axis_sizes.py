"""On which sizes of dynamic axes a model runs, found out by running it."""

from __future__ import annotations

import numpy as np
import pytest

from leanserve.bases.axis_sizes import with_sizes
from leanserve.bases.description import Tensor
from leanserve.bases.probing import spec_of_inputs
from leanserve.contracts import Array, Arrays
from leanserve.errors import ConfigError

SEQUENCE = (Tensor(name="x", dtype="float32", shape=(None, 6)),)


def test_sizes_of_dynamic_axes_are_found_by_trying() -> None:
    def halving(batch: Arrays) -> list[Array]:
        """As a U-net joins what was halved and doubled again."""
        length = batch[0].shape[1]
        return [batch[0] + np.ones((1, length // 32 * 32 or 2, 1), np.float32)]

    def framing(batch: Arrays) -> list[Array]:
        return [np.lib.stride_tricks.sliding_window_view(batch[0], 100, axis=1)]

    def positioned(batch: Arrays) -> list[Array]:
        return [batch[0] + np.ones((1, 100, 1), np.float32)[:, np.arange(batch[0].shape[1])]]

    spec = spec_of_inputs(SEQUENCE, "one_length")
    found, caveats = with_sizes(halving, spec, ["y"])
    assert (found.step, found.least, caveats) == (32, 1, ())
    assert [found.size(wanted) for wanted in (1, 32, 33)] == [32, 32, 64]
    assert found.example(2, 40)[0].shape == (2, 64, 6)
    long = with_sizes(framing, spec, ["y"]).spec
    assert (long.step, long.least, long.max_length) == (1, 128, 512)
    assert with_sizes(positioned, spec, ["y"]).spec.max_length == 64


def test_an_image_of_one_height_keeps_its_dynamic_width() -> None:
    def reading(batch: Arrays) -> list[Array]:
        return [batch[0].reshape(len(batch[0]), 48, -1)] if batch[0].shape[1] == 48 or batch[0].shape[1] < 30 else []

    image = (Tensor(name="x", dtype="float32", shape=(None, None)),)
    found, [caveat] = with_sizes(reading, spec_of_inputs(image, "one_length"), ["y"])
    assert found.inputs[0].shape == (48, None)
    assert "takes x as [48, any], the first sizes on which it ran" in caveat


def test_what_runs_on_one_size_only_has_it() -> None:
    def window(batch: Arrays) -> list[Array]:
        return [batch[0].reshape(len(batch[0]), 160, 6)]

    def nowhere(batch: Arrays) -> list[Array]:
        raise ValueError("out of order")

    found, [caveat] = with_sizes(window, spec_of_inputs(SEQUENCE, "any"), ["y"])
    assert found.inputs[0].shape == (160, 6)
    assert "takes x as [160, 6]" in caveat
    with pytest.raises(ConfigError, match=r"does not run on \[1, 16, 6\]: out of order"):
        with_sizes(nowhere, spec_of_inputs(SEQUENCE, "any"), ["y"])
