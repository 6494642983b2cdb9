"""Images in: the codec of models of images.

A body is untrusted: sizes are read from the headers before a pixel is decoded, and whatever is wrong becomes an error
that says where, before anything reaches a queue. Bodies:

- `image/jpeg`, `image/png`, `image/webp` ... (`leanserve.codecs.image_formats`): one image; `image/*`,
  `application/octet-stream` or no type: of these formats, the one that it begins like;
- `multipart/form-data`: files, see `leanserve.codecs.uploads`;
- `application/json`: `{"inputs": ...}` with pixels or files in base64, see `leanserve.codecs.pixels`.

All take the same path (orientation -> mode -> resize -> scale -> normalise), so that an image gets the same answer as
PNG, as upload and as JSON pixels; docs/images.md says it to the bit. Transparency is composited on black, 16-bit grey
keeps its upper 8 bits, colour profiles are not applied, and orientation tags are if the config says so. How an image of
any size is laid on the input is in `leanserve.codecs.geometry`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.geometry import Anchor, Geometry, ImageFit, Layout
from leanserve.codecs.image_files import UNTOLD, EncodedImage, OpenedImage, Orientation, decoded, opened, reduced
from leanserve.codecs.image_formats import BY_MEDIA_TYPE, FORMAT_NAMES, FormatName, media_types
from leanserve.codecs.image_limits import DEFAULT_LIMITS, REDUCING_GAP, RESIZE_S, WHOLE_PIXELS, ImageLimits
from leanserve.codecs.json_weight import json_seconds
from leanserve.codecs.pixels import Placed, parse_images, to_array
from leanserve.codecs.uploads import FORM, file_of_json, files_of_form, holds_file
from leanserve.contracts import Array, Arrays, Decoded, Json, Weighed
from leanserve.errors import BadInput, BodyTooLarge, ConfigError, UnsupportedMediaType

JSON = "application/json"
PARSED_AT_ONCE_S = 2e-3
"""Seconds that parsing JSON may take to find the images in it, whose headers tell what else it takes."""
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


Mode = Literal["L", "RGB", "BGR"]
CHANNELS = {"L": 1, "RGB": 3, "BGR": 3}
LEAST_SIDE = 64
"""A side of the input that follows the image counts at least as that many pixels in what one request may have."""


class _Prepared(NamedTuple):
    """An image as the model takes it, float32 [C, H, W], and how it lies there."""

    row: Array
    layout: Layout


@dataclass(frozen=True, slots=True)
class ImageCodec:
    """Codec of a base that takes one float32 image field [C, H, W].

    `size` is (width, height), `None` where a side follows the image; `fit`, `crop`, `anchor`, `max_side`, `step` and
    `least` are those of `Geometry`. `mean` and `std` are per channel, of pixels scaled to 0..1, in the order of `mode`.
    `fill` is the pixel value, per channel, of what an image does not cover. `orientation` says whether tags turn an
    image before everything else, `formats` which files are read. `limits` bound the images of a request.
    """

    mode: Mode
    size: tuple[int | None, int | None]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    answers: AnswerEncoder
    resize: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    fit: ImageFit = "stretch"
    crop: float = 1.0
    anchor: Anchor = "center"
    fill: tuple[float, ...] = (0.0,)
    max_side: int = 512
    step: int = 1
    least: int = 1
    orientation: Orientation = "stored"
    formats: tuple[FormatName, ...] = FORMAT_NAMES
    limits: ImageLimits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        channels = CHANNELS[self.mode]
        if not len(self.mean) == len(self.std) == channels:
            raise ConfigError(f"an image of mode {self.mode} needs {channels} values in mean and in std")

    @property
    def geometry(self) -> Geometry:
        """How an image of any size is laid on the input."""
        return Geometry(self.size, self.fit, self.crop, self.anchor, self.max_side, self.step, self.least)

    @property
    def media_types(self) -> tuple[str, ...]:
        return (*media_types(self.formats), *filter(None, UNTOLD), FORM, JSON)

    def prepare(self, media_type: str, body: bytes) -> Weighed[Decoded]:
        """Read the headers of all images; of a large body of JSON only count what is in it. Raises as `decode`."""
        kind = media_type.partition(";")[0].strip().lower()
        if kind == JSON:
            parse = partial(self._from_body, body)
            seconds = json_seconds(body)
            return Weighed(seconds, lambda: parse().finish()) if seconds > PARSED_AT_ONCE_S else parse()
        if kind == FORM:
            files = files_of_form(media_type, body, self._most_rows)
            return self._looked_at(map(self._opened, files), many=len(files) > 1)
        self._require_taken(kind, media_type)
        return self._looked_at([self._opened(EncodedImage(kind, body, "the body"))], many=False)

    def decode(self, media_type: str, body: bytes) -> Decoded:
        """Body -> float32 [rows, C, H, W].

        Raises:
            BadInput: the body is not what its media type says; the text says where.
            BodyTooLarge: the images are above the `limits`.
            UnsupportedMediaType: none of `media_types`; of parameters, only a form's `boundary` counts.
        """
        return self.prepare(media_type, body).finish()

    def encode(self, outputs: Arrays, most: int | None = None) -> list[dict[str, Json]]:
        """One answer per row, see `leanserve.codecs.answers`."""
        return self.answers.encode(outputs, most)

    def row(self, image: Image.Image) -> Array:
        """Image -> float32 [C, H, W], scaled and normalised."""
        return self._prepared(OpenedImage(image, "the image"), self.geometry).row

    def _from_body(self, body: bytes) -> Weighed[Decoded]:
        placed, many = parse_images(body)
        self._require_room(len(placed))
        return self._looked_at(map(self._from_json, placed), many=many)

    def _looked_at(self, images: Iterable[OpenedImage], *, many: bool) -> Weighed[Decoded]:
        geometry = self.geometry
        waiting = self._bounded(images, geometry)
        resizing = sum(layout.resizing for image in waiting for layout in self._layouts(image, geometry)[:1])
        seconds = sum(image.seconds for image in waiting) + resizing * RESIZE_S
        return Weighed(seconds, partial(self._decoded, waiting, geometry, many=many))

    def _decoded(self, waiting: deque[OpenedImage], geometry: Geometry, *, many: bool) -> Decoded:
        """Images -> float32 [rows, C, H, W]; where rows differ in size, smaller ones are filled up to the largest."""
        prepared = []
        while waiting:
            # Each image goes as soon as it is done: decoded, it is larger than its row.
            prepared.append(self._prepared(waiting.popleft(), geometry))
        rows = [item.row for item in prepared]
        places = tuple([item.layout.placement() for item in prepared])
        if not geometry.is_dynamic:
            return Decoded((stacked(rows),), many, places=places, tells_places=self.fit == "letterbox")
        lengths = self._lengths(rows)
        return Decoded((stacked(rows),), many, lengths, places, tells_places=True)

    def _lengths(self, rows: list[Array]) -> tuple[int, ...]:
        """Of the side that follows the image, where it is one."""
        if self.size.count(None) == 1:
            return tuple([row.shape[2 if self.size[0] is None else 1] for row in rows])
        sizes = [f"{row.shape[2]} x {row.shape[1]}" for row in rows]
        if self.answers.spec.rows != "any" and len(set(sizes)) > 1:
            raise BadInput(
                f"the images come to inputs of {' and '.join(dict.fromkeys(sizes))} pixels, which must not share a "
                "batch of this model; send them in requests of their own"
            )
        return ()

    def _prepared(self, received: OpenedImage, geometry: Geometry) -> _Prepared:
        image = decoded(received, "L" if self.mode == "L" else "RGB", self.orientation)
        lies = (image.width > image.height) == (received.size[0] > received.size[1])
        layout = geometry.layout(received.size if lies else received.size[::-1])
        mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (self.mean, self.std))
        row = np.empty((len(mean), layout.canvas[1], layout.canvas[0]), np.float32)
        place = row
        if self.fit == "letterbox":
            row[...] = (np.array(self.fill, np.float32)[:, None, None] / np.float32(255) - mean) / std
            (left, top), (wide, high) = layout.corner, layout.scaled
            place = row[:, top : top + high, left : left + wide]
        pixels = np.asarray(self._fitted(image, layout))
        planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        np.divide(planes[::-1] if self.mode == "BGR" else planes, np.float32(255), out=place, dtype=np.float32)
        np.subtract(place, mean, out=place)
        np.divide(place, std, out=place)
        return _Prepared(row, layout)

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
        width, height = (LEAST_SIDE if side is None else side for side in self.size)
        return min(self.limits.count, self.limits.pixels // (width * height))

    def _bounded(self, images: Iterable[OpenedImage], geometry: Geometry) -> deque[OpenedImage]:
        """The images, none of them decoded; refuses what would take too much memory or time while they are opened."""
        waiting: deque[OpenedImage] = deque()
        total, widest, highest = 0, 1, 1
        for image in images:
            layouts = self._layouts(image, geometry)
            work = max(self._work(image, layouts))
            if work > self.limits.pixels:
                reason = self._reason(image, layouts)
                raise BodyTooLarge(f"{image.where}: {reason}, above the limit of {self.limits.pixels} pixels")
            self._require_short(image)
            waiting.append(_reduced(image, layouts))
            total += max(work, *(layout.pixels for layout in layouts))
            # Together the rows take as much room as if each were as large as the largest.
            widest = max(widest, *(layout.canvas[0] for layout in layouts))
            highest = max(highest, *(layout.canvas[1] for layout in layouts))
            if max(total, len(waiting) * widest * highest) > self.limits.pixels:
                raise BodyTooLarge(f"{len(waiting)} images are above the limit of {self.limits.pixels} pixels together")
        return waiting

    def _require_short(self, image: OpenedImage) -> None:
        if (side := max(image.size)) > self.limits.side:
            size, most = "{} x {} pixels".format(*image.size), self.limits.side
            raise BodyTooLarge(
                f"{image.where}: the image has {size}, and {side} is above the limit of {most} for a side"
            )

    def _layouts(self, image: OpenedImage, geometry: Geometry) -> list[Layout]:
        """How it will be laid out: as it is stored, or turned. The tag may stand behind the pixels."""
        width, height = image.size
        turned = [(height, width)] if self.orientation == "exif" else []
        return [geometry.layout(size) for size in ((width, height), *turned)]

    def _work(self, image: OpenedImage, layouts: list[Layout]) -> tuple[int, int, int]:
        """What an image costs, in pixels: to hold, to decode, to resize."""
        width, height = image.size
        return width * height, image.work, max(layout.resizing for layout in layouts)

    def _reason(self, image: OpenedImage, layouts: list[Layout]) -> str:
        """What costs most in an image."""
        work = self._work(image, layouts)
        size = "{} x {} pixels".format(*image.size)
        reasons = (
            f"the image has {size}",
            image.told,
            f"{size} become {work[2]} on the way to the size of the model's input",
        )
        return reasons[work.index(max(work))]

    def _fitted(self, image: Image.Image, layout: Layout) -> Image.Image:
        """The image as large as it lies on the input, without the edges that are cut off."""
        large = image.resize(layout.scaled, FILTERS[self.resize])
        left, top = (-side for side in layout.corner)
        width, height = layout.canvas
        return large.crop((left, top, left + width, top + height)) if self.fit == "crop" else large


def _reduced(image: OpenedImage, layouts: list[Layout]) -> OpenedImage:
    """An image to be decoded no larger than the resize needs to average over, if it is large."""
    if image.size[0] * image.size[1] <= WHOLE_PIXELS:
        return image
    wide, high = (max(layout.scaled[axis] for layout in layouts) for axis in (0, 1))
    if len(layouts) > 1:  # it is not known yet whether it is turned
        wide = high = max(wide, high)
    return reduced(image, (wide * REDUCING_GAP, high * REDUCING_GAP))


def stacked(rows: list[Array]) -> Array:
    """Rows [C, H, W] as one batch; smaller ones are filled up with zeros, as they are when requests share a batch."""
    if len(rows) == 1:
        return rows[0][None]
    if len({row.shape for row in rows}) == 1:
        return np.stack(rows)
    shape = [max(sides) for sides in zip(*(row.shape for row in rows), strict=True)]
    batch = np.zeros((len(rows), *shape), np.float32)
    for place, row in zip(batch, rows, strict=True):
        place[:, : row.shape[1], : row.shape[2]] = row
    return batch
