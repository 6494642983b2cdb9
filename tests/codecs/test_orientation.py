"""`orientation: exif` turns an image as `ImageOps.exif_transpose` does, before everything else; `stored` does not."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import orjson
import pytest
from PIL import Image, ImageOps, features

from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.image_limits import ImageLimits
from leanserve.codecs.images import ImageCodec
from leanserve.contracts import Array, ModelSpec
from leanserve.errors import BodyTooLarge
from tiff_pages import grey, page

ANSWERS = AnswerEncoder(ModelSpec((), ()))
STORED = ImageCodec(
    mode="RGB", size=(20, 30), mean=(0,) * 3, std=(1,) * 3, answers=ANSWERS, fit="crop", resize="bicubic"
)
UPRIGHT = replace(STORED, orientation="exif")
WIDE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8))
FORMS = [
    "JPEG",
    "PNG",
    "WEBP",
    pytest.param("AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="no AVIF in this Pillow")),
]


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def tagged(orientation: int, **others: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "a camera"
    return exif.tobytes()


def decoded(codec: ImageCodec, body: bytes) -> Array:
    return codec.decode("", body).inputs[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_applied_before_everything_else(form: str, orientation: int) -> None:
    body = encoded(WIDE, form, exif=tagged(orientation))
    as_stored = Image.open(BytesIO(body))
    upright = ImageOps.exif_transpose(as_stored)
    assert (upright.size == (24, 40)) == (orientation >= 5)
    np.testing.assert_array_equal(decoded(UPRIGHT, body), decoded(STORED, encoded(upright.convert("RGB"), "PNG")))
    np.testing.assert_array_equal(decoded(STORED, body), decoded(STORED, encoded(as_stored.convert("RGB"), "PNG")))
    assert np.array_equal(decoded(STORED, body), decoded(UPRIGHT, body)) == (orientation == 1)


@pytest.mark.parametrize("codec", [STORED, UPRIGHT], ids=["stored", "exif"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_the_decoder_of_tiff_turns_by_itself(codec: ImageCodec, compression: str | None, orientation: int) -> None:
    """As `Image.open` gives it to every library; it is not turned twice."""
    body = encoded(WIDE, "TIFF", compression=compression, exif=tagged(orientation))
    theirs = Image.open(BytesIO(body))
    theirs.load()
    assert (theirs.size == (24, 40)) == (orientation >= 5)
    np.testing.assert_array_equal(decoded(codec, body), decoded(STORED, encoded(theirs, "PNG")))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "I;16", "1"])
def test_every_kind_of_pixel_is_turned(mode: str) -> None:
    image = Image.fromarray(np.asarray(WIDE)[..., 0].astype(np.uint16) << 8) if mode == "I;16" else WIDE.convert(mode)
    options: dict[str, Any] = {"transparency": 3} if mode == "P" else {}
    turned = image.transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(
        decoded(UPRIGHT, encoded(image, "PNG", exif=tagged(6), **options)),
        decoded(STORED, encoded(turned, "PNG", **options)),
    )


def test_metadata_behind_the_pixels_count() -> None:
    """PNG allows its EXIF chunk after the pixels."""
    plain, exif = encoded(WIDE, "PNG"), tagged(8)[6:]
    chunk = b"eXIf" + exif
    late = plain[:-12] + struct.pack(">I", len(exif)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + plain[-12:]
    assert late.index(b"IDAT") < late.index(b"eXIf")
    turned = WIDE.transpose(Image.Transpose.ROTATE_90)
    np.testing.assert_array_equal(decoded(UPRIGHT, late), decoded(STORED, encoded(turned, "PNG")))


def test_xmp_counts_where_exif_says_nothing_as_in_pillow() -> None:
    xmp = b'<x:xmpmeta xmlns:tiff="t"><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'
    body = encoded(WIDE, "JPEG", xmp=xmp)
    turned = ImageOps.exif_transpose(Image.open(BytesIO(body)))
    np.testing.assert_array_equal(decoded(UPRIGHT, body), decoded(STORED, encoded(turned, "PNG")))
    assert not np.array_equal(decoded(UPRIGHT, body), decoded(STORED, body))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0garbage that is no TIFF",
        tagged(6)[:12],
        tagged(6)[:20],
        tagged(0),
        tagged(9),
        tagged(65535),
        b"Exif\0\0",
    ],
    ids=["garbage", "short", "cut", "0", "9", "65535", "empty"],
)
def test_metadata_that_say_nothing_leave_the_pixels_as_stored(form: str, exif: bytes) -> None:
    body = encoded(WIDE, form, exif=exif)
    np.testing.assert_array_equal(decoded(UPRIGHT, body), decoded(STORED, body))


def test_an_odd_tag_beside_the_orientation_does_not_matter() -> None:
    """`ImageOps.exif_transpose` fails here: it writes all other tags anew."""
    exif = tagged(6)
    odd = exif.replace(struct.pack(">HHI", 0x010F, 2, 9), struct.pack(">HHI", 0x010F, 12, 1))  # text as a number
    assert odd != exif
    body = encoded(WIDE, "PNG", exif=odd)
    turned = WIDE.transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(decoded(UPRIGHT, body), decoded(STORED, encoded(turned, "PNG")))


def test_pixels_in_json_have_no_tag() -> None:
    body = orjson.dumps({"inputs": np.asarray(WIDE).tolist()})
    one, other = (codec.decode("application/json", body).inputs[0] for codec in (STORED, UPRIGHT))
    np.testing.assert_array_equal(one, other)


def test_a_sliver_is_bounded_in_both_ways_where_a_tag_may_turn_it() -> None:
    """40,000 pixels in a row are little work to shrink; turned, each would become a row of the model's width first."""
    stored = ImageCodec(
        mode="L", size=(32, 32), mean=(0,), std=(1,), answers=ANSWERS, limits=ImageLimits(1_000_000, side=10**6)
    )
    body = encoded(Image.new("L", (40_000, 1)), "PNG")
    assert stored.decode("", body).inputs[0].shape == (1, 1, 32, 32)
    with pytest.raises(BodyTooLarge, match="40000 x 1 pixels become 1280000 on the way"):
        replace(stored, orientation="exif").decode("", body)


def test_a_tiff_that_turns_is_bounded_by_its_pixels() -> None:
    body = page(grey(3, 2, t274=6), bytes(range(6)))
    assert decoded(STORED, body).shape == (1, 3, 30, 20)
