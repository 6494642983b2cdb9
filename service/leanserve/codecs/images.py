"""Images in: the codec of models of images.

A body is untrusted: sizes are read from the headers before a pixel is decoded, and whatever is wrong becomes an error
that says where, before anything reaches a queue. Bodies:

- `image/jpeg`, `image/png`, `image/webp` ... (`leanserve.codecs.image_formats`): one image; `image/*`,
  `application/octet-stream` or no type: of these formats, the one that it begins like;
- `multipart/form-data`: files, see `leanserve.codecs.uploads`;
- `application/json`: `{"inputs": ...}` with pixels or files in base64, see `leanserve.codecs.pixels`.

All take the same path (orientation -> mode -> resize -> scale -> normalise), so that an image gets the same answer as
PNG, as upload and as JSON pixels; docs/images.md says it to the bit. Transparency is composited on black, 16-bit grey
keeps its upper 8 bits, colour profiles are not applied, and orientation tags are if the config says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import floor
from typing import Literal

import numpy as np
from PIL import Image

from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.image_files import UNTOLD, EncodedImage, OpenedImage, Orientation, decoded, opened
from leanserve.codecs.image_formats import BY_MEDIA_TYPE, FORMAT_NAMES, FormatName, media_types
from leanserve.codecs.pixels import Placed, parse_images, to_array
from leanserve.codecs.uploads import FORM, file_of_json, files_of_form, holds_file
from leanserve.contracts import Array, Arrays, Decoded, Json
from leanserve.errors import BodyTooLarge, ConfigError, UnsupportedMediaType

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

    `size` is (width, height). `mean` and `std` are per channel, of pixels scaled to 0..1. `orientation` says whether
    tags turn an image before everything else, `formats` which files are read. `max_pixels` bounds the images of a
    request together, as sent and while they are resized; each counts at least as much as the model sees.
    """

    mode: Literal["L", "RGB"]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    answers: AnswerEncoder
    resize: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    fit: Literal["stretch", "crop"] = "stretch"
    crop: float = 1.0
    orientation: Orientation = "stored"
    formats: tuple[FormatName, ...] = FORMAT_NAMES
    max_pixels: int = 50_000_000

    def __post_init__(self) -> None:
        channels = {"L": 1, "RGB": 3}[self.mode]
        if not len(self.mean) == len(self.std) == channels:
            raise ConfigError(f"an image of mode {self.mode} needs {channels} values in mean and in std")

    @property
    def media_types(self) -> tuple[str, ...]:
        return (*media_types(self.formats), *filter(None, UNTOLD), FORM, JSON)

    def decode(self, media_type: str, body: bytes) -> Decoded:
        """Body -> float32 [rows, C, H, W].

        Raises:
            BadInput: the body is not what its media type says; the text says where.
            BodyTooLarge: the images are above `max_pixels`.
            UnsupportedMediaType: none of `media_types`; of parameters, only a form's `boundary` counts.
        """
        kind = media_type.partition(";")[0].strip().lower()
        if kind == JSON:
            placed, many = parse_images(body)
            self._require_room(len(placed))
            return Decoded((self._rows(map(self._from_json, placed)),), many)
        if kind == FORM:
            files = files_of_form(media_type, body, self._most_rows)
            return Decoded((self._rows(map(self._opened, files)),), many=len(files) > 1)
        self._require_taken(kind, media_type)
        return Decoded((self._rows([self._opened(EncodedImage(kind, body, "the body"))]),), many=False)

    def encode(self, outputs: Arrays) -> list[dict[str, Json]]:
        """One answer per row, see `leanserve.codecs.answers`."""
        return self.answers.encode(outputs)

    def row(self, image: Image.Image) -> Array:
        """Image -> float32 [C, H, W], scaled and normalised."""
        rows = self._rows([OpenedImage(image, "the image")])
        return np.asarray(rows[0])

    def _rows(self, images: Iterable[OpenedImage]) -> Array:
        """Images -> float32 [rows, C, H, W]."""
        waiting = self._bounded(images)
        mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (self.mean, self.std))
        rows = np.empty((len(waiting), len(mean), self.size[1], self.size[0]), np.float32)
        for row in rows:
            # Each image goes as soon as it is done: decoded, it is larger than its row.
            pixels = np.asarray(self._fitted(decoded(waiting.popleft(), self.mode, self.orientation)))
            planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
            np.divide(planes, np.float32(255), out=row, dtype=np.float32)
            np.subtract(row, mean, out=row)
            np.divide(row, std, out=row)
        return rows

    def _opened(self, file: EncodedImage) -> OpenedImage:
        return opened(file, self.formats)

    def _from_json(self, placed: Placed) -> OpenedImage:
        value, where = placed
        if holds_file(value):
            return self._opened(file_of_json(value, where))
        return OpenedImage(Image.fromarray(to_array(value, where)), where)

    def _require_taken(self, kind: str, media_type: str) -> None:
        format_ = BY_MEDIA_TYPE.get(kind)
        if kind in UNTOLD or (format_ is not None and format_.name in self.formats and format_.readable):
            return
        if format_ is not None and format_.name in self.formats:
            raise UnsupportedMediaType(f"content type {format_.unreadable}")
        raise UnsupportedMediaType(f"content type {media_type!r} is none of {', '.join(self.media_types)}")

    def _require_room(self, rows: int) -> None:
        if rows > self._most_rows:
            raise BodyTooLarge(f"{rows} images are more than the {self._most_rows} that one request may have")

    @property
    def _most_rows(self) -> int:
        return self.max_pixels // (self.size[0] * self.size[1])

    def _bounded(self, images: Iterable[OpenedImage]) -> deque[OpenedImage]:
        """The images, none of them decoded; refuses what would take too much memory or time while they are opened."""
        waiting: deque[OpenedImage] = deque()
        total = 0
        for image in images:
            work = max(self._work(image))
            if work > self.max_pixels:
                raise BodyTooLarge(f"{image.where}: {self._reason(image)}, above the limit of {self.max_pixels} pixels")
            waiting.append(image)
            total += max(work, self.size[0] * self.size[1])
            if total > self.max_pixels:
                raise BodyTooLarge(f"{len(waiting)} images are above the limit of {self.max_pixels} pixels together")
        return waiting

    def _work(self, image: OpenedImage) -> tuple[int, int, int]:
        """What an image costs, in pixels: to hold, to decode, to resize."""
        width, height = image.image.size
        resizing = self._resizing(width, height)
        if self.orientation == "exif":  # the tag may stand behind the pixels, so that both ways count
            resizing = max(resizing, self._resizing(height, width))
        return width * height, image.work, resizing

    def _resizing(self, width: int, height: int) -> int:
        """Pixels that resizing goes through: Pillow does it in two passes, first all rows to their new width."""
        wide, high = self._scaled(width, height)
        return wide * max(high, height)

    def _reason(self, image: OpenedImage) -> str:
        """What costs most in an image."""
        work = self._work(image)
        size = "{} x {} pixels".format(*image.image.size)
        reasons = (
            f"the image has {size}",
            image.told,
            f"{size} become {work[2]} on the way to the size of the model's input",
        )
        return reasons[work.index(max(work))]

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        """To which size an image of this one is resized; with `fit: crop` the centre of that is cut out.

        Rounds as torchvision's Resize does, so that a checkpoint sees the pixels it was evaluated on.
        """
        if self.fit == "stretch":
            return self.size
        wide, high = (floor(side / self.crop) for side in self.size)
        if wide * height >= high * width:
            return wide, int(wide * height / width)
        return int(high * width / height), high

    def _fitted(self, image: Image.Image) -> Image.Image:
        """An image of `size`. The centre is rounded as in torchvision's CenterCrop."""
        width, height = self.size
        large = image.resize(self._scaled(*image.size), FILTERS[self.resize])
        left, top = round((large.width - width) / 2), round((large.height - height) / 2)
        return large if large.size == self.size else large.crop((left, top, left + width, top + height))
