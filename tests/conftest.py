"""Fixtures for all tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """Backends flush denormals on the thread that creates them; in a test that may be the one of all later tests."""
    yield
    if sys.float_info.min / 2 == 0:
        torch.set_flush_denormal(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread: sums have one order, and tiny models are faster than with a pool."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
