"""Pictures in, class probabilities out: the codec of image classifiers.

A body is untrusted: its size is read from the header before a pixel is decoded, only the decoder of the declared format
ever sees it, and whatever is wrong becomes an error that says where, before anything reaches a queue.

All bodies take the same path (mode -> resize -> scale -> normalise), so that a picture gets the same answer as PNG
and as JSON pixels:
- `image/png`, `image/jpeg`: one picture. Transparency is composited on black, 16-bit grey keeps its upper 8 bits, and
  the pixels are taken as stored (orientation tags are not applied).
- `application/json`: `{"inputs": pixels}`, a picture or a list of pictures; see `service.api.codecs.pixels`.

A picture of any size is taken; it is stretched to the input's size, which does not keep its aspect ratio.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from service.api.codecs.pixels import parse_pictures, to_array
from service.contracts import Array, Arrays, Decoded, Json
from service.errors import BackendFailed, BadInput, BodyTooLarge, ConfigError, UnsupportedMediaType

JSON = "application/json"
DECODERS: dict[str, type[ImageFile]] = {"image/png": PngImageFile, "image/jpeg": JpegImageFile}
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MANY_LABELS, BEST = 20, 5
"""With more labels than the first number, an answer tells only so many of the best scores."""


@dataclass(frozen=True, slots=True)
class ImageCodec:
    """Codec of a base that takes one float32 image field [C, H, W] and whose first output is the logits of `labels`.

    `size` is (width, height). `mean` and `std` are per channel, of pixels scaled to 0..1. `max_pixels` bounds an image
    file as sent, and the pictures of a JSON body together as resized.
    """

    mode: Literal["L", "RGB"]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    labels: tuple[str, ...]
    resize: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    max_pixels: int = 50_000_000

    def __post_init__(self) -> None:
        channels = {"L": 1, "RGB": 3}[self.mode]
        if not len(self.mean) == len(self.std) == channels:
            raise ConfigError(f"a picture of mode {self.mode} needs {channels} values in mean and in std")
        if len(set(self.labels)) < len(self.labels):
            raise ConfigError("the labels must differ from each other: they are the keys of the scores")

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
            rows = [self._row(Image.fromarray(to_array(*picture))) for picture in pictures]
            return Decoded((np.stack(rows),), many)
        if kind in DECODERS:
            return Decoded((self._row(self._open(DECODERS[kind], body))[None],), many=False)
        raise UnsupportedMediaType(f"content type {media_type!r} is none of {', '.join(self.media_types)}")

    def encode(self, outputs: Arrays) -> list[dict[str, Json]]:
        """Logits [rows, labels] -> per row the best label and the probabilities, best first.

        Raises:
            BackendFailed: the logits are not finite (JSON has no NaN) or not one per label.
        """
        logits = outputs[0].astype(np.float64)
        if logits.ndim != 2 or logits.shape[1] != len(self.labels):
            raise BackendFailed(f"the model gave {logits.shape} logits for {len(self.labels)} labels")
        broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if broken.size:
            raise BackendFailed(f"the model's logits are not finite in row {broken[0]}")
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        told = BEST if len(self.labels) > MANY_LABELS else len(self.labels)
        best = (-logits).argsort(axis=1, kind="stable")[:, :told]
        scores = np.take_along_axis(shares, best, axis=1)
        return [self._answer(*row) for row in zip(best.tolist(), scores.tolist(), strict=True)]

    def _answer(self, best: list[int], scores: list[float]) -> dict[str, Json]:
        names = [self.labels[column] for column in best]
        # Six digits are more than float32 logits justify, and a third of the bytes.
        return {"label": names[0], "scores": {name: round(p, 6) for name, p in zip(names, scores, strict=True)}}

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

    def _row(self, picture: Image.Image) -> Array:
        """Picture -> float32 [C, H, W], scaled and normalised."""
        small = np.asarray(_in_mode(picture, self.mode).resize(self.size, FILTERS[self.resize]), dtype=np.float32)
        planes = small[None] if small.ndim == 2 else small.transpose(2, 0, 1)
        mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (self.mean, self.std))
        return np.asarray((planes / np.float32(255) - mean) / std)


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
