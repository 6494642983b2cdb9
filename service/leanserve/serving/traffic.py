"""Which variant answers: an explicit name wins, then a sticky key, then the weights; without any, the base."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from random import random

from leanserve.token_bucket import TokenBucket

_NONE: Mapping[str, float] = {}


@dataclass(frozen=True, slots=True)
class TrafficRules:
    """Who gets the requests that name no variant: weights by variant (none: all go to the base), and the most requests
    per second of some; what is beyond that goes to the base, too."""

    weights: Mapping[str, float] = field(default_factory=dict)
    caps: Mapping[str, float] = field(default_factory=dict)


class TrafficSplit:
    """The split among the variants of a fleet, those that are away included. On the event loop only.

    `weights` are those among the variants that serve now. `capped` counts the requests that a cap sent to the base.
    """

    def __init__(self, salt: str) -> None:
        """`salt` keeps callers' keys from meaning the same in two services."""
        self.rules = TrafficRules()
        self.weights: Mapping[str, float] = _NONE
        self.capped: dict[str, int] = {}
        self._salt = self._own_salt = salt
        self._override: Mapping[str, float] | None = None
        self._whole: Mapping[str, float] = _NONE
        self._names: tuple[str, ...] = ()
        self._sole = ""
        self._buckets: dict[str, TokenBucket] = {}

    @property
    def base(self) -> str:
        """The variant that answers where nothing says otherwise: the first one; empty if there is none."""
        return self._names[0] if self._names else ""

    @property
    def shares(self) -> dict[str, float]:
        """By variant, those that are away included; they add up to 1 unless none serves."""
        total = sum(self.weights.values())
        return {name: self.weights.get(name, 0.0) / total if total else 0.0 for name in self._names}

    def give(self, rules: TrafficRules) -> None:
        """Go by these rules from now on."""
        self.rules = rules
        self._buckets = {name: TokenBucket(rate, max(1, math.ceil(rate))) for name, rate in rules.caps.items()}
        self.capped = {name: self.capped.get(name, 0) for name in rules.caps}

    def override(self, weights: Mapping[str, float] | None, salt: str = "") -> None:
        """Go by these weights instead of those of the rules, with keys salted anew; `None`: by the rules again."""
        self._override = weights
        self._salt = salt or self._own_salt

    def share_out(self, names: Iterable[str], serving: Iterable[str]) -> None:
        """Find who gets what, among all these variants, the base first, of which some serve."""
        self._names = tuple(names)
        given = self.rules.weights if self._override is None else self._override
        self._whole = normalize_weights(given, self._names)
        self.weights = normalize_weights(given, tuple(serving))
        every = [name for name, weight in self._whole.items() if weight]
        sole = every[0] if len(every) == 1 else ""
        self._sole = sole if sole in self.weights and sole not in self._buckets else ""

    def choose(self, caller_key: str | None) -> str:
        """The variant of a request that names none; empty if none serves."""
        if self._sole:
            return self._sole
        chosen = choose_variant(self._whole, self.weights, caller_key, self._salt)
        bucket = self._buckets.get(chosen)
        if bucket is None or self.base not in self.weights or not bucket.take():
            return chosen
        self.capped[chosen] += 1
        return self.base


def normalize_weights(given: Mapping[str, float], names: Iterable[str]) -> Mapping[str, float]:
    """The split over these variants: as given, or all to the first where nothing was, or nothing of these."""
    weights = {name: given.get(name, 0.0) for name in names}
    if weights and not any(weights.values()):
        weights[next(iter(weights))] = 1.0
    return weights


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
