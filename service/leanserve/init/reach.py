"""How far the passes of a variant reach into a model, and what is left to gain by that.

What a pass gains was measured on models that it reaches altogether. What it leaves as it was takes its time as before
(Amdahl 1967), and of arithmetic that is removed a part comes back as time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

Gain: TypeAlias = tuple[float, float]
"""Least and most, in times the speed of what it is compared with."""
COMES_BACK: Gain = (0.4, 0.7)
"""Of the speed that fewer multiplications promise: half of them gave 1.4 to 1.7 times of two (docs/passes.md)."""


class Reach(NamedTuple):
    """What was found when the passes were tried; `None`: it does not concern them, or is not known."""

    eight_bits: float | None = None
    """Share (0..1) of the multiplications that are made in 8 bits."""
    convolutions: float | None = None
    """Share of the multiplications that are those of convolutions, which an order of the pixels reaches."""
    left: float | None = None
    """Share of the multiplications that factorising and pruning leave, where they are asked to leave fewer."""
    norms: tuple[int, int] | None = None
    """Batch norms that are folded into a layer, and all of the model."""
    narrowed: float | None = None
    """Times the speed of before, as it was measured when floats were made narrower."""

    def of(self, gain: Gain, folding: Gain = (1.0, 1.0)) -> Gain:
        """What to expect in this model of passes that gain so much where they reach all; `folding`: beside that, of
        folding all batch norms."""
        share = next((known for known in (self.eight_bits, self.convolutions) if known is not None), 1.0)
        norms = 1.0 if self.norms is None else self.norms[0] / self.norms[1]
        fewer = 1.0 if self.left is None else 1 / self.left
        gain, share = (gain, share) if self.narrowed is None else ((self.narrowed, self.narrowed), 1.0)
        low, high = (
            _partly(main, share) * _partly(fold, norms) * (1 + part * (fewer - 1))
            for main, fold, part in zip(gain, folding, COMES_BACK, strict=True)
        )
        return low, high

    def told(self) -> Iterator[str]:
        """What was found, in words."""
        if self.eight_bits is not None:
            yield f"8 bits reach {self.eight_bits:.0%} of the arithmetic"
        if self.convolutions is not None:
            yield f"convolutions are {self.convolutions:.0%} of the arithmetic"
        if self.left is not None:
            yield f"{self.left:.0%} of the arithmetic is left"
        if self.narrowed is not None:
            yield "as measured on a few rows when it was tried"
        if self.norms is not None and self.norms[0] < self.norms[1]:
            yield f"{self.norms[0]} of {self.norms[1]} batch norms can be folded"


def _partly(gain: float, share: float) -> float:
    return 1 / (1 - share + share / gain)
