"""Pictures in: the codec of models of images.

A body is untrusted: sizes are read from the headers before a pixel is decoded, and whatever is wrong becomes an error
that says where, before anything reaches a queue. Bodies:

- `image/png`, `image/jpeg`: one picture; `image/*`, `application/octet-stream` or no type: of these two, what it is;
- `multipart/form-data`: files, see `service.api.codecs.uploads`;
- `application/json`: `{"inputs": ...}` with pixels or files in base64, see `service.api.codecs.pixels`.

All take the same path (mode -> resize -> scale -> normalise), so that a picture gets the same answer as PNG, as upload
and as JSON pixels; docs/pictures.md says it to the bit. Pixels are taken as stored: transparency is composited on
black, 16-bit grey keeps its upper 8 bits, orientation tags and colour profiles are not applied.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import floor
from typing import Literal

import numpy as np
from PIL import Image

from service.api.codecs.answers import Answers
from service.api.codecs.picture_files import (
    ALIASES,
    DECODERS,
    UNTOLD,
    USUAL_SCANS,
    Picture,
    PictureFile,
    decoded,
    opened,
)
from service.api.codecs.pixels import Placed, parse_pictures, to_array
from service.api.codecs.uploads import FORM, file_of_json, files_of_form, holds_file
from service.contracts import Array, Arrays, Decoded, Json
from service.errors import BodyTooLarge, ConfigError, UnsupportedMediaType

JSON = "application/json"
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, slots=True)
class ImageCodec:
    """Codec of a base that takes one float32 image field [C, H, W].

    `size` is (width, height). `mean` and `std` are per channel, of pixels scaled to 0..1. `max_pixels` bounds the
    pictures of a request together, as sent and while they are resized; each counts at least as much as the model sees.
    """

    mode: Literal["L", "RGB"]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    answers: Answers
    resize: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    fit: Literal["stretch", "crop"] = "stretch"
    crop: float = 1.0
    max_pixels: int = 50_000_000

    def __post_init__(self) -> None:
        channels = {"L": 1, "RGB": 3}[self.mode]
        if not len(self.mean) == len(self.std) == channels:
            raise ConfigError(f"a picture of mode {self.mode} needs {channels} values in mean and in std")

    @property
    def media_types(self) -> tuple[str, ...]:
        return (*DECODERS, *filter(None, UNTOLD), FORM, JSON)

    def decode(self, media_type: str, body: bytes) -> Decoded:
        """Body -> float32 [rows, C, H, W].

        Raises:
            BadInput: the body is not what its media type says; the text says where.
            BodyTooLarge: the pictures are above `max_pixels`.
            UnsupportedMediaType: none of `media_types`; of parameters, only a form's `boundary` counts.
        """
        kind = media_type.partition(";")[0].strip().lower()
        if kind == JSON:
            placed, many = parse_pictures(body)
            self._require_room(len(placed))
            return Decoded((self._rows(map(_from_json, placed)),), many)
        if kind == FORM:
            files = files_of_form(media_type, body, self._most_rows)
            return Decoded((self._rows(map(opened, files)),), many=len(files) > 1)
        if kind in DECODERS or kind in ALIASES or kind in UNTOLD:
            return Decoded((self._rows([opened(PictureFile(kind, body, "the body"))]),), many=False)
        raise UnsupportedMediaType(f"content type {media_type!r} is none of {', '.join(self.media_types)}")

    def encode(self, outputs: Arrays) -> list[dict[str, Json]]:
        """One answer per row, see `service.api.codecs.answers`."""
        return self.answers.encode(outputs)

    def row(self, picture: Image.Image) -> Array:
        """Picture -> float32 [C, H, W], scaled and normalised."""
        rows = self._rows([Picture(picture, "the picture")])
        return np.asarray(rows[0])

    def _rows(self, pictures: Iterable[Picture]) -> Array:
        """Pictures -> float32 [rows, C, H, W]."""
        waiting = deque(pictures)
        self._bound(waiting)
        mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (self.mean, self.std))
        rows = np.empty((len(waiting), len(mean), self.size[1], self.size[0]), np.float32)
        for row in rows:
            # Each picture goes as soon as it is done: decoded, it is larger than its row.
            pixels = np.asarray(self._fitted(decoded(waiting.popleft(), self.mode)))
            planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
            np.divide(planes, np.float32(255), out=row, dtype=np.float32)
            np.subtract(row, mean, out=row)
            np.divide(row, std, out=row)
        return rows

    def _require_room(self, rows: int) -> None:
        if rows > self._most_rows:
            raise BodyTooLarge(f"{rows} pictures are more than the {self._most_rows} that one request may have")

    @property
    def _most_rows(self) -> int:
        return self.max_pixels // (self.size[0] * self.size[1])

    def _bound(self, pictures: Collection[Picture]) -> None:
        """Refuse what would take too much memory or time, before any of it is decoded."""
        total = 0
        for picture in pictures:
            work = max(self._work(picture))
            if work > self.max_pixels:
                raise BodyTooLarge(
                    f"{picture.where}: {self._reason(picture)}, above the limit of {self.max_pixels} pixels"
                )
            total += max(work, self.size[0] * self.size[1])
        if total > self.max_pixels:
            raise BodyTooLarge(f"{len(pictures)} pictures are above the limit of {self.max_pixels} pixels together")

    def _work(self, picture: Picture) -> tuple[int, int, int]:
        """What a picture costs, in pixels: to hold, to decode, to resize."""
        width, height = picture.image.size
        wide, high = self._scaled(width, height)
        # Pillow resizes in two passes, first all rows to their new width.
        return width * height, width * height * picture.passes // USUAL_SCANS, wide * max(high, height)

    def _reason(self, picture: Picture) -> str:
        """What costs most in a picture."""
        work = self._work(picture)
        size = "{} x {} pixels".format(*picture.image.size)
        reasons = (
            f"the picture has {size}",
            f"{size} in {picture.passes} scans are as much work as {work[1]} pixels in {USUAL_SCANS}",
            f"{size} become {work[2]} on the way to the size of the model's input",
        )
        return reasons[work.index(max(work))]

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        """To which size a picture of this one is resized; with `fit: crop` the centre of that is cut out.

        Rounds as torchvision's Resize does, so that a checkpoint sees the pixels it was evaluated on.
        """
        if self.fit == "stretch":
            return self.size
        wide, high = (floor(side / self.crop) for side in self.size)
        if wide * height >= high * width:
            return wide, int(wide * height / width)
        return int(high * width / height), high

    def _fitted(self, picture: Image.Image) -> Image.Image:
        """A picture of `size`. The centre is rounded as in torchvision's CenterCrop."""
        width, height = self.size
        large = picture.resize(self._scaled(*picture.size), FILTERS[self.resize])
        left, top = round((large.width - width) / 2), round((large.height - height) / 2)
        return large if large.size == self.size else large.crop((left, top, left + width, top + height))


def _from_json(placed: Placed) -> Picture:
    value, where = placed
    return (
        opened(file_of_json(value, where))
        if holds_file(value)
        else Picture(Image.fromarray(to_array(value, where)), where)
    )
