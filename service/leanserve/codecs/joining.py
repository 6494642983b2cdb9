"""Large parts put together without Python's lock: of 250 MB it would be held for an eighth of a second."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np

_LITTLE = 2**20
"""Bytes that are copied at once, in 0.1 ms."""


def joined(parts: Sequence[bytes | memoryview]) -> bytes:
    """All parts in one."""
    sizes = [memoryview(part).nbytes for part in parts]
    size, start = sum(sizes), 0
    if size <= _LITTLE:
        return b"".join(parts)
    whole = BytesIO(bytes(size))
    view = np.frombuffer(whole.getbuffer(), np.uint8)
    for part, length in zip(parts, sizes, strict=True):
        view[start : start + length] = np.frombuffer(part, np.uint8)
        start += length
    del view
    return whole.getvalue()  # not a copy, as nobody else has its buffer any more
