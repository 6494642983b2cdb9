"""An image file that nobody vouches for: what it is, how much work it would be, and its pixels.

Its header is read first, so that what is too large is refused before a pixel is decoded; and what a decoder would do
that the size does not tell (scans, tiles, hidden frames) is counted before the decoder sees the file.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from io import BytesIO
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from PIL.ExifTags import Base
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from leanserve.codecs.image_formats import BY_MEDIA_TYPE, FormatName, ImageFormat, media_types, recognised
from leanserve.errors import BadInput

Orientation = Literal["stored", "exif"]
UNTOLD = ("", "image/*", "application/octet-stream")
"""Media types that do not say which kind of image it is."""
USUAL_SCANS = 10
"""In which encoders write a progressive JPEG."""
REDUCED_SHARE = 0.6
"""Of the time that a JPEG takes to decode, what is left at a reduced size: half of it and more is reading its code."""
_START_OF_SCAN = b"\xff\xda"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By the value of the orientation tag; 1 and all others leave an image as it is stored."""


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A file as it was sent: what its sender says it is, its bytes, and where in the request it stands."""

    media_type: str
    content: bytes
    where: str

    def __str__(self) -> str:
        return f"{self.where} ({len(self.content)} bytes)"


class OpenedImage(NamedTuple):
    """An image whose size is known, decoded or not.

    `work`: pixels that decoding goes over, 0 for those that it has; `told`: why these are more, for an error;
    `pixel_s`: seconds for one of them; `stored_size`: (width, height) where it is decoded at a reduced size.
    """

    image: Image.Image
    where: str
    work: int = 0
    told: str = ""
    pixel_s: float = 0.0
    stored_size: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as stored."""
        return self.stored_size or self.image.size

    @property
    def seconds(self) -> float:
        """About how long decoding takes."""
        width, height = self.size
        share = 1.0 if self.stored_size is None else REDUCED_SHARE
        return max(width * height, self.work) * self.pixel_s * share


def opened(file: EncodedImage, names: Collection[FormatName]) -> OpenedImage:
    """The image with its header read and no pixel decoded.

    Raises:
        BadInput: it is not what its media type says, not an image at all, of none of the formats with these `names`, or
            of a kind that is not decoded.
    """
    kind = _kind(file, names)
    # Pillow's decoders raise nearly anything on hostile bytes: OSError, SyntaxError, struct.error, KeyError ...
    try:
        work = kind.work(file.content)
        image = kind.decoder(BytesIO(file.content))
    except Exception as error:
        raise BadInput(f"{file} cannot be read as {kind.media_type}: {_reason(error)}") from error
    if 0 in image.size:
        raise BadInput(f"{file} is a {image.format} image without pixels")
    return _weighed(image, file, work)._replace(pixel_s=kind.pixel_s)


def reduced(received: OpenedImage, least: tuple[int, int]) -> OpenedImage:
    """The image to be decoded at the smallest size that its format offers from `least` on: a JPEG at 1/2, 1/4 or 1/8.

    Its decoder leaves fine detail out instead of computing it for a resize to average it away.
    """
    image = received.image
    if not isinstance(image, JpegImageFile):
        return received
    stored = image.size
    image.draft(image.mode, least)
    return received if image.size == stored else received._replace(stored_size=stored)


def decoded(received: OpenedImage, mode: str, orientation: Orientation) -> Image.Image:
    """All pixels, in 8 bits grey (`L`) or `RGB`; of an animation the first frame. Raises `BadInput`."""
    image = received.image
    try:
        image.load()
        return in_mode(upright(image) if orientation == "exif" else image, mode)
    except MemoryError:  # the size was checked before: it is not the image's fault
        raise
    except Exception as error:
        raise BadInput(
            f"{received.where}: the {image.format} image ({received.size[0]} x {received.size[1]}) cannot be decoded: "
            f"{_reason(error)}"
        ) from error


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image in 8 bits grey or RGB, transparency composited on black."""
    if image.mode.startswith("I;16"):  # grey; Pillow's own conversion would clip it at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "La":  # grey already multiplied with its transparency, for which Pillow knows one conversion only
        image = image.convert("LA")
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return image if image.mode == mode else image.convert(mode)


def upright(image: Image.Image) -> Image.Image:
    """A decoded image as its orientation tag says that it is seen; metadata that cannot be read hold none.

    As `ImageOps.exif_transpose`, which would also write the metadata anew and fail where some other tag is odd.
    """
    try:
        turn = _TURNS.get(image.getexif().get(Base.Orientation, 1))
    except Exception:
        return image
    return image if turn is None else image.transpose(turn)


def _weighed(image: ImageFile, file: EncodedImage, work: int) -> OpenedImage:
    """With the work that decoding it is."""
    size = f"{image.width} x {image.height} pixels"
    if image.format == "JPEG":
        # A few bytes ask for one more scan. In pixel data the marker's two bytes cannot follow each other.
        scans = max(1, file.content.count(_START_OF_SCAN))
        work = image.width * image.height * scans // USUAL_SCANS
        told = f"{size} in {scans} scans are as much work as {work} pixels in {USUAL_SCANS}"
        return OpenedImage(image, file.where, work, told)
    return OpenedImage(image, file.where, work, f"to decode its {size} is as much work as {work} of them are")


def _kind(file: EncodedImage, names: Collection[FormatName]) -> ImageFormat:
    """The format whose decoder gets this file."""
    declared, seen = BY_MEDIA_TYPE.get(file.media_type), recognised(file.content)
    if declared is None and file.media_type not in UNTOLD:
        raise BadInput(f"{file.where} is sent as {file.media_type}, which is none of {', '.join(media_types(names))}")
    found = declared or seen
    if found is None:
        raise BadInput(f"{file} begins like none of {', '.join(media_types(names))}")
    if found.name not in names:
        raise BadInput(f"{file.where} is {found.media_type}, which is none of {', '.join(media_types(names))}")
    if not found.readable:
        raise BadInput(f"{file.where}: {found.unreadable}")
    if found is not seen:
        told = "does not begin like one" if seen is None else f"begins like {seen.media_type}"
        raise BadInput(f"{file} is sent as {file.media_type}, but {told}")
    return found


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
