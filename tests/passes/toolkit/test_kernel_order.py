"""Kernels are trained channels last where that is quicker, and not where oneDNN would write beyond its memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leanserve.passes.toolkit.training import order_kernels


def two(inputs: int, stride: int, kernel: int = 1, groups: int = 1) -> nn.Module:
    """An ordinary convolution, and one with a shortcut's."""
    shortcut = nn.Conv2d(inputs, 4 * groups, kernel, stride, groups=groups)
    return nn.Sequential(nn.Conv2d(3, inputs, 3, padding=1), shortcut)


@pytest.mark.parametrize(
    ("module", "reordered"),
    [
        (two(8, 2), True),
        (two(4, 1), True),
        (two(4, 2, kernel=3), True),
        (two(4, 2), False),
        (two(7, 3), False),
        (two(16, 2, groups=4), False),
    ],
    ids=["eight inputs", "no stride", "a wider kernel", "four inputs", "seven", "four in each group"],
)
def test_kernels_are_ordered_where_their_gradients_are_safe(module: nn.Sequential, reordered: bool) -> None:  # noqa: FBT001
    order_kernels(module, torch.channels_last)
    weight = module[0].weight
    assert isinstance(weight, torch.Tensor)
    assert (not weight.is_contiguous()) == reordered
    module(torch.randn(4, 3, 8, 8)).square().mean().backward()
    order_kernels(module, torch.contiguous_format)
    assert weight.is_contiguous()
