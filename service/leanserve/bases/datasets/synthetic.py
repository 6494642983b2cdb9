"""`data: {synthetic: N}`: random rows that fit the model, for a first look at speed before there is data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from leanserve.contracts import ArrayData, ModelSpec, Split

SEEDS: dict[Split, int] = {"train": 1, "calibration": 2, "gate": 3, "test": 4}


@dataclass(frozen=True)
class SyntheticRows:
    """A `bases.loaded.Rows` without labels; every split is drawn with a seed of its own."""

    spec: ModelSpec
    count: int
    length: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"synthetic {self.count} {self.length}".encode()).hexdigest()

    @property
    def unit(self) -> int:
        return 1

    def split(self, split: Split, n: int | None) -> ArrayData:
        rows = self.count if n is None else min(n, self.count)
        return ArrayData(tuple(array[:rows] for array in self.spec.example(self.count, self.length, SEEDS[split])))
