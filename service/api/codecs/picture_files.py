"""A PNG or JPEG file that nobody vouches for: what it is, how much work it would be, and its pixels.

Only the decoder of one format ever sees a file: of the declared one, or of the one that its first bytes tell where the
sender did not say. Its header is read first, so that what is too large is refused before a pixel is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from service.errors import BadInput

PNG, JPEG = "image/png", "image/jpeg"
DECODERS: dict[str, type[ImageFile]] = {PNG: PngImageFile, JPEG: JpegImageFile}
MAGIC = {PNG: b"\x89PNG\r\n\x1a\n", JPEG: b"\xff\xd8\xff"}
ALIASES = {"image/jpg": JPEG, "image/pjpeg": JPEG}
"""Names that are no media types, but widely sent."""
UNTOLD = ("", "image/*", "application/octet-stream")
"""Media types that do not say which kind of picture it is."""
USUAL_SCANS = 10
"""In which encoders write a progressive JPEG."""
_START_OF_SCAN = b"\xff\xda"


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A file as it was sent: what its sender says it is, its bytes, and where in the request it stands."""

    media_type: str
    content: bytes
    where: str

    def __str__(self) -> str:
        return f"{self.where} ({len(self.content)} bytes)"


class Picture(NamedTuple):
    """A picture whose size is known, decoded or not; `passes`: how often decoding goes over all its pixels."""

    image: Image.Image
    where: str
    passes: int = 1


def opened(file: PictureFile) -> Picture:
    """The picture with its header read and no pixel decoded.

    Raises:
        BadInput: it is not what its media type says, not a picture at all, or of a kind without a decoder.
    """
    kind = _kind(file)
    decoder = DECODERS[kind]
    # Pillow's decoders raise nearly anything on hostile bytes: OSError, SyntaxError, struct.error, KeyError ...
    try:
        image = decoder(BytesIO(file.content))
    except Exception as error:
        found = _sniffed(file.content)
        hint = f"; it begins like {found}" if found not in {None, kind} else ""
        raise BadInput(f"{file} is not a {decoder.format} picture: {_reason(error)}{hint}") from error
    if 0 in image.size:
        raise BadInput(f"{file} is a {decoder.format} picture without pixels")
    # A few bytes ask for one more scan. In pixel data the marker's two bytes cannot follow each other.
    scans = file.content.count(_START_OF_SCAN) if kind == JPEG else 1
    return Picture(image, file.where, max(1, scans))


def decoded(picture: Picture, mode: str) -> Image.Image:
    """All pixels, in 8 bits grey (`L`) or `RGB`. Raises `BadInput`."""
    image = picture.image
    try:
        image.load()
        return in_mode(image, mode)
    except Exception as error:
        raise BadInput(
            f"{picture.where}: the {image.format} picture ({image.width} x {image.height}) cannot be decoded: "
            f"{_reason(error)}"
        ) from error


def in_mode(picture: Image.Image, mode: str) -> Image.Image:
    """The picture in 8 bits grey or RGB, transparency composited on black."""
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        picture = Image.alpha_composite(black, picture.convert("RGBA"))
    return picture if picture.mode == mode else picture.convert(mode)


def _kind(file: PictureFile) -> str:
    """The media type of the decoder for this file."""
    declared = ALIASES.get(file.media_type, file.media_type)
    if declared in DECODERS:
        return declared
    if declared not in UNTOLD:
        raise BadInput(f"{file.where} is sent as {file.media_type}, which is none of {', '.join(DECODERS)}")
    found = _sniffed(file.content)
    if found is None:
        raise BadInput(f"{file} begins like neither {' nor '.join(DECODERS)}")
    return found


def _sniffed(content: bytes) -> str | None:
    return next((kind for kind, magic in MAGIC.items() if content.startswith(magic)), None)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
