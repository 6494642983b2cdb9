"""How large the images of one request may be, and what they are expected to cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

RESIZE_S = 3e-9
"""Seconds per pixel that a resize goes through."""
WHOLE_PIXELS = 2_000_000
"""Up to so many an image is decoded whole, whatever its format: it is quick, and every format gets the same answer."""
REDUCING_GAP = 3
"""How many times larger than what it is resized to an image is decoded at least. On photos the model's pixels then
differ by at most 3 of 255 from those of a full decode, 0.4 in the mean; by 9 at twice the size."""


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """Bounds on the images of a request.

    `pixels` bounds them together, as sent and while they are resized; each counts at least as much as the model sees.
    `side` bounds the longer side of each: a resize takes memory by the length of a row, however few there are. `count`
    bounds their number.
    """

    pixels: int = 50_000_000
    side: int = 16_384
    count: int = 4096


DEFAULT_LIMITS: Final = ImageLimits()
