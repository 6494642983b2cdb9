"""Which variant answers: pure functions. An explicit name wins, then a sticky key, then the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def share_out(weights: Mapping[str, float], point: float) -> str:
    """The variant at `point` in [0, 1) when the interval is divided in proportion to the weights."""
    target = point * sum(weights.values())
    chosen = ""
    for name, weight in weights.items():
        if weight > 0:
            chosen = name
            if target < weight:
                break
        target -= weight
    return chosen


def sticky_point(key: str, salt: str) -> float:
    """A point in [0, 1) that is always the same for a caller's key; the salt keeps experiments independent."""
    digest = hashlib.blake2b(key.encode(), key=salt.encode()[:64], digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)
