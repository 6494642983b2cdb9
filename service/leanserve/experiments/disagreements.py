"""The last rows that two variants answered differently, for somebody to look at.

Bounded in rows and in bytes. What a client sent is kept only if the operator asks for it: it may be private.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from leanserve.contracts import Json
from leanserve.experiments.answer_pairs import RowDifferences


@dataclass(frozen=True, slots=True)
class Disagreement:
    """One row with two answers."""

    at: float
    """Seconds since the epoch."""
    request: str
    """The id of its request."""
    row: int
    outputs: Json
    """How far each is from the base's (`row_details`)."""
    payload: bytes | None = None
    """The request as it was sent, if payloads are kept."""


class DisagreementRing:
    """The last `size` disagreements. One thread."""

    def __init__(self, size: int = 256, payload_bytes: int = 0) -> None:
        """`payload_bytes` of requests are kept with them in all, the newest; by default none."""
        self._kept: deque[Disagreement] = deque(maxlen=size)
        self._payload_bytes = payload_bytes

    def add(self, disagreement: Disagreement) -> None:
        """Keep one; the oldest, or its payload, makes room."""
        too_long = len(disagreement.payload or b"") > self._payload_bytes
        self._kept.append(replace(disagreement, payload=None) if too_long else disagreement)
        held = sum(len(item.payload or b"") for item in self._kept)
        for index in range(len(self._kept)):
            if held <= self._payload_bytes:
                return
            held -= len(self._kept[index].payload or b"")
            self._kept[index] = replace(self._kept[index], payload=None)

    def __iter__(self) -> Iterator[Disagreement]:
        """The newest first."""
        return reversed(self._kept)

    def __len__(self) -> int:
        return len(self._kept)


def row_details(found: Mapping[str, RowDifferences], row: int) -> Json:
    """How far the outputs of one row are apart, as plain values: what its outputs' meanings ask for."""
    return {name: _described(item, row) for name, item in found.items()}


def _described(item: RowDifferences, row: int) -> Json:
    numbers = {name: float(getattr(item, name)[row]) for name in ("max_abs", "kl", "cosine", "overlap")}
    told = {name: value for name, value in numbers.items() if math.isfinite(value)}
    flags = {"agreed": bool(item.agreed[row]), "broken": bool(item.broken[row])}
    return flags | told | ({"class": item.classes[row]} if item.classes else {})
