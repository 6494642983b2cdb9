"""Which variant answers: functions without state. An explicit name wins, then a sticky key, then the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from random import random


def normalize_weights(given: Mapping[str, float], names: Iterable[str]) -> Mapping[str, float]:
    """The traffic split over these variants: as given, or equal where nothing was, or nothing of these."""
    weights = {name: given.get(name, 0.0) if given else 1.0 for name in names}
    return weights if any(weights.values()) else dict.fromkeys(weights, 1.0)


def choose_variant(split: Mapping[str, float], serving: Mapping[str, float], caller_key: str | None, salt: str) -> str:
    """A variant by the whole `split`, at random or as the key has it; by the weights of those `serving` if it is away.

    So a key whose variant is unloaded goes to one of the others, and no other key moves. Empty if none serves.
    """
    if len(split) == 1:
        (chosen,) = split
    else:
        chosen = weighted_choice(split, random() if caller_key is None else sticky_point(caller_key, salt))
    if chosen in serving:
        return chosen
    return weighted_choice(serving, random() if caller_key is None else sticky_point(caller_key, f"stand-in {salt}"))


def weighted_choice(weights: Mapping[str, float], point: float) -> str:
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
