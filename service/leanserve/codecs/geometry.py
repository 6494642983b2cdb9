"""Where an image lies on a model's input, worked out from its size alone, before a pixel is decoded.

Boxes that a detector finds are in pixels of its input; the client wants them in those of its own image. So how an image
was scaled and shifted is kept (`contracts.Placement`) and comes back with the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Literal, NamedTuple

from leanserve.contracts import Placement

Size = tuple[int, int]
"""(width, height) in pixels."""
ImageFit = Literal["stretch", "crop", "letterbox"]
Anchor = Literal["center", "start"]


class Layout(NamedTuple):
    """How one image becomes an input: resized to `scaled`, then laid on an input of size `canvas` with its left upper
    corner at `corner`, which is negative where edges of it are cut off."""

    image: Size
    canvas: Size
    scaled: Size
    corner: Size

    @property
    def resizing(self) -> int:
        """Pixels that resizing goes through: Pillow does it in two passes, first all rows to their new width."""
        return self.scaled[0] * max(self.scaled[1], self.image[1])

    @property
    def pixels(self) -> int:
        """Of the input."""
        return self.canvas[0] * self.canvas[1]

    def placement(self) -> Placement:
        """As a client is told."""
        wide, high = (new / old for new, old in zip(self.scaled, self.image, strict=True))
        return Placement(self.image, self.canvas, (wide, high), self.corner)


@dataclass(frozen=True, slots=True)
class Geometry:
    """The rule by which images of any size become inputs.

    `size` is (width, height) of the input. A side that is `None` follows the image: of one, by the image's proportions;
    of two, by its own size, made smaller so that neither is above `max_side`. Such sides are at least `least`, and
    rounded up to multiples of `step`.
    """

    size: tuple[int | None, int | None]
    fit: ImageFit = "stretch"
    crop: float = 1.0
    anchor: Anchor = "center"
    max_side: int = 512
    step: int = 1
    least: int = 1

    @property
    def is_dynamic(self) -> bool:
        """Whether inputs differ in size."""
        return None in self.size

    def layout(self, image: Size) -> Layout:
        """How an image of this size is laid out."""
        canvas = self._canvas(image)
        if self.fit == "stretch":
            return Layout(image, canvas, canvas, (0, 0))
        if self.fit == "crop":
            scaled = self._covering(image, canvas)
            left, top = (round((large - side) / 2) for large, side in zip(scaled, canvas, strict=True))
            return Layout(image, canvas, scaled, (-left, -top))
        scaled = _contained(image, canvas)
        if self.anchor == "start":
            return Layout(image, canvas, scaled, (0, 0))
        return Layout(image, canvas, scaled, ((canvas[0] - scaled[0]) // 2, (canvas[1] - scaled[1]) // 2))

    def _canvas(self, image: Size) -> Size:
        width, height = self.size
        if width is None and height is None:
            share = min(1.0, self.max_side / max(image))
            return self._allowed(image[0] * share), self._allowed(image[1] * share)
        if width is None:
            assert height is not None
            return self._allowed(image[0] * height / image[1]), height
        return width, self._allowed(image[1] * width / image[0]) if height is None else height

    def _allowed(self, wanted: float) -> int:
        """The side nearest above that an input may have."""
        steps = max(1, -(-max(round(wanted), self.least) // self.step))
        return min(steps, max(1, self.max_side // self.step)) * self.step

    def _covering(self, image: Size, canvas: Size) -> Size:
        """A size that covers the input and what is to be cut off.

        Rounds as torchvision's Resize does, so that a checkpoint sees the pixels it was evaluated on.
        """
        width, height = image
        wide, high = (floor(side / self.crop) for side in canvas)
        if wide * height >= high * width:
            return wide, int(wide * height / width)
        return int(high * width / height), high


def _contained(image: Size, canvas: Size) -> Size:
    """The largest size of the image's proportions within the input."""
    share = min(canvas[0] / image[0], canvas[1] / image[1])
    return min(canvas[0], max(1, round(image[0] * share))), min(canvas[1], max(1, round(image[1] * share)))
