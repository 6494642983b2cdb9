"""JSON written in pieces: the same bytes as in one go, and others get Python's lock meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from leanserve.codecs import joining, json_pieces
from leanserve.codecs.joining import joined
from leanserve.codecs.json_pieces import json_text
from leanserve.runtime.short_switches import ShortSwitches

MANY = 10**9
NUMBERS = arrays.arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.bool_]),
    arrays.array_shapes(max_dims=4, max_side=6),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(max_size=200) | NUMBERS,
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=5), inner, max_size=8),
    max_leaves=30,
)


def in_one_go(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


@given(VALUES, st.integers(1, 20))
def test_pieces_of_any_size_make_the_same_bytes(value: Any, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_pieces, "PIECE", piece)
        assert json_text(value, MANY) == in_one_go(value)


@pytest.mark.parametrize("shape", [(3, 400_000), (400_000, 3), (1_200_000,), (2, 0), (0, 5)])
def test_many_numbers_make_the_same_bytes(shape: tuple[int, ...]) -> None:
    rows = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    value = {"predictions": [{"outputs": {"y": row}} for row in rows] if len(shape) > 1 else rows, "variant": "a"}
    assert json_text(value, MANY) == in_one_go(value)


@pytest.mark.parametrize("sizes", [(0,), (3, 0, 4), (joining._LITTLE, 1), (700_000, 5, 700_000)])
def test_parts_are_joined(sizes: tuple[int, ...]) -> None:
    parts = [bytes(np.random.default_rng(size).integers(0, 255, size, np.uint8)) for size in sizes]
    assert joined([memoryview(part) for part in parts]) == b"".join(parts)


def longest_hold(work: Callable[[], object]) -> float:
    """Seconds for which this thread, which often wants it, could not have Python's lock."""
    thread = threading.Thread(target=work)
    longest = 0.0
    with ShortSwitches():
        before = time.perf_counter()
        thread.start()  # which waits until it runs, and may then have to wait for the lock
        while thread.is_alive():
            time.sleep(0.0002)
            now = time.perf_counter()
            longest, before = max(longest, now - before), now
    return longest


def test_others_get_the_lock_while_millions_of_numbers_are_written() -> None:
    rows = list(np.random.default_rng(0).normal(size=(8, 1_000_000)).astype(np.float32))
    plain = min(longest_hold(lambda: in_one_go(rows)) for _ in range(3))
    pieces = min(longest_hold(lambda: json_text(rows, MANY)) for _ in range(3))
    assert pieces < plain / 3
