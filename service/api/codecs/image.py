"""Pictures in: the codec of models of images.

A body is untrusted: its size is read from the header before a pixel is decoded, only the decoder of the declared format
ever sees it, and whatever is wrong becomes an error that says where, before anything reaches a queue.

All bodies take the same path (mode -> resize -> scale -> normalise), so that a picture gets the same answer as PNG
and as JSON pixels:
- `image/png`, `image/jpeg`: one picture. Transparency is composited on black, 16-bit grey keeps its upper 8 bits, and
  the pixels are taken as stored (orientation tags are not applied).
- `application/json`: `{"inputs": pixels}`, a picture or a list of pictures; see `service.api.codecs.pixels`.

A picture of any size is taken. It is stretched to the input's size, or cut out of the centre (`fit`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from service.api.codecs.answers import Answers
from service.api.codecs.pixels import parse_pictures, to_array
from service.contracts import Array, Arrays, Decoded, Json
from service.errors import BadInput, BodyTooLarge, ConfigError, UnsupportedMediaType

JSON = "application/json"
DECODERS: dict[str, type[ImageFile]] = {"image/png": PngImageFile, "image/jpeg": JpegImageFile}
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, slots=True)
class ImageCodec:
    """Codec of a base that takes one float32 image field [C, H, W].

    `size` is (width, height). `mean` and `std` are per channel, of pixels scaled to 0..1. `max_pixels` bounds an image
    file as sent, and the pictures of a JSON body together as resized.
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
        return (*DECODERS, JSON)

    def decode(self, media_type: str, body: bytes) -> Decoded:
        """Body -> float32 [rows, C, H, W].

        Raises:
            BadInput: the body is not what its media type says; the text says where.
            BodyTooLarge: the pictures are above `max_pixels`.
            UnsupportedMediaType: none of `media_types`; parameters such as `charset` are ignored.
        """
        kind = media_type.partition(";")[0].strip().lower()
        if kind == JSON:
            pictures, many = parse_pictures(body)
            self._bound(len(pictures), self.size, f"{len(pictures)} pictures, resized to")
            rows = [self.row(Image.fromarray(to_array(*picture))) for picture in pictures]
            return Decoded((np.stack(rows),), many)
        if kind in DECODERS:
            return Decoded((self.row(self._open(DECODERS[kind], body))[None],), many=False)
        raise UnsupportedMediaType(f"content type {media_type!r} is none of {', '.join(self.media_types)}")

    def encode(self, outputs: Arrays) -> list[dict[str, Json]]:
        """One answer per row, see `service.api.codecs.answers`."""
        return self.answers.encode(outputs)

    def _open(self, decoder: type[ImageFile], body: bytes) -> Image.Image:
        """Decode an untrusted file; before `load`, only its header is read."""
        name = decoder.format
        # Pillow's decoders raise nearly anything on hostile bytes: OSError, SyntaxError, struct.error, KeyError ...
        try:
            picture = decoder(BytesIO(body))
        except Exception as error:
            raise BadInput(f"the body ({len(body)} bytes) is not a {name} picture: {_reason(error)}") from error
        self._bound(1, picture.size, f"the {name} picture has")
        try:
            picture.load()
            return _in_mode(picture, self.mode)
        except Exception as error:
            width, height = picture.size
            raise BadInput(f"the {name} picture ({width} x {height}) cannot be decoded: {_reason(error)}") from error

    def _bound(self, pictures: int, size: tuple[int, int], what: str) -> None:
        if pictures * size[0] * size[1] > self.max_pixels:
            raise BodyTooLarge(f"{what} {size[0]} x {size[1]} pixels, above the limit of {self.max_pixels} pixels")

    def row(self, picture: Image.Image) -> Array:
        """Picture -> float32 [C, H, W], scaled and normalised."""
        small = np.asarray(self._fitted(_in_mode(picture, self.mode)), dtype=np.float32)
        planes = small[None] if small.ndim == 2 else small.transpose(2, 0, 1)
        mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (self.mean, self.std))
        return np.asarray((planes / np.float32(255) - mean) / std)

    def _fitted(self, picture: Image.Image) -> Image.Image:
        """Resized to `size`; with `fit: crop` the short side to `size / crop` first, then the centre is cut out.

        Rounds as torchvision's Resize and CenterCrop do, so that a checkpoint sees the pixels it was evaluated on.
        """
        width, height = self.size
        if self.fit == "stretch":
            return picture.resize(self.size, FILTERS[self.resize])
        short = math.floor(min(self.size) / self.crop)
        longer = int(short * max(picture.size) / min(picture.size))
        scaled = (short, longer) if picture.width <= picture.height else (longer, short)
        large = picture.resize(scaled, FILTERS[self.resize])
        left, top = round((large.width - width) / 2), round((large.height - height) / 2)
        return large.crop((left, top, left + width, top + height))


def _in_mode(picture: Image.Image, mode: str) -> Image.Image:
    """The picture in 8 bits grey or RGB, transparency composited on black."""
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
        picture = Image.alpha_composite(black, picture.convert("RGBA"))
    return picture if picture.mode == mode else picture.convert(mode)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
