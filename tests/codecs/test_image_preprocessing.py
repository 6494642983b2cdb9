"""docs/images.md to the bit: an implementation of its own, and what timm evaluates checkpoints with."""

from __future__ import annotations

from io import BytesIO
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.images import ImageCodec
from leanserve.contracts import Array, ModelSpec, TensorSpec

ANSWERS = AnswerEncoder(ModelSpec((), (TensorSpec("logits", "float32", (2,), meaning="logits"),), ("a", "b")))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(300, 200), (200, 300), (97, 131), (224, 224), (225, 500), (1, 60), (511, 64)]


def codec(size: tuple[int, int] = (224, 224), mode: Literal["L", "RGB"] = "RGB", **options: Any) -> ImageCodec:
    mean, std = (MEAN, STD) if mode == "RGB" else ((0.3,), (0.7,))
    return ImageCodec(mode=mode, size=size, mean=mean, std=std, answers=ANSWERS, **options)


def photo(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Smooth enough to survive a JPEG, rough enough to show every rounding."""
    noise = np.random.default_rng(size[0]).integers(0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def cropped(image: Image.Image, side: int, share: float, resample: Image.Resampling) -> Image.Image:
    """Steps 3 and 4 of docs/images.md for a square input."""
    width, height = image.size
    short = int(np.floor(side / share))
    if width <= height:
        image = image.resize((short, int(short * height / width)), resample)
    else:
        image = image.resize((int(short * width / height), short), resample)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def normalised(image: Image.Image) -> Array:
    """Step 5, pixel by pixel in float32."""
    pixels = np.asarray(image).astype(np.float32)
    planes = [
        (pixels[:, :, channel] / np.float32(255) - np.float32(MEAN[channel])) / np.float32(STD[channel])
        for channel in range(3)
    ]
    return np.stack(planes)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("share", "name", "resample"),
    [(0.875, "bicubic", Image.Resampling.BICUBIC), (1.0, "bilinear", Image.Resampling.BILINEAR)],
)
def test_crop_is_as_documented(size: tuple[int, int], share: float, name: Any, resample: Image.Resampling) -> None:
    image = photo(size)
    decoded = codec(fit="crop", crop=share, resize=name).decode("image/png", encoded(image, "PNG")).inputs[0]
    assert decoded.dtype == np.float32
    assert decoded.flags.c_contiguous
    np.testing.assert_array_equal(decoded[0], normalised(cropped(image, 224, share, resample)))


@pytest.mark.parametrize("size", SIZES)
def test_stretch_is_as_documented(size: tuple[int, int]) -> None:
    image = photo(size)
    decoded = codec((50, 30)).decode("image/png", encoded(image, "PNG")).inputs[0]
    np.testing.assert_array_equal(decoded[0], normalised(image.resize((50, 30), Image.Resampling.BILINEAR)))


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (100, 100)])
def test_a_crop_that_is_not_square_covers_the_whole_input(size: tuple[int, int]) -> None:
    decoded = codec((96, 64), fit="crop").decode("image/png", encoded(Image.new("RGB", size, (9, 99, 199)), "PNG"))
    np.testing.assert_array_equal(decoded.inputs[0][0], normalised(Image.new("RGB", (96, 64), (9, 99, 199))))


@pytest.mark.parametrize(
    ("form", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True, "quality": 60}),
        ("JPEG", "RGB", {"subsampling": 0, "quality": 95}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("PNG", "L", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {}),
    ],
    ids=["jpeg", "progressive", "4:4:4", "grey jpeg", "cmyk", "grey png", "palette", "two colours"],
)
def test_every_kind_of_file_becomes_what_pillow_decodes(form: str, mode: str, options: dict[str, Any]) -> None:
    body = encoded(photo((120, 90), mode), form, **options)
    decoded = codec((120, 90)).decode(f"image/{form.lower()}", body).inputs[0]
    np.testing.assert_array_equal(decoded[0], normalised(Image.open(BytesIO(body)).convert("RGB")))


def test_transparency_is_composited_on_black() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    decoded = codec((7, 9), resize="nearest").decode("image/png", encoded(Image.fromarray(pixels), "PNG")).inputs[0]
    black = pixels[:, :, :3] * (pixels[:, :, 3:] / 255)
    # Pillow blends in whole numbers and may be one off.
    np.testing.assert_allclose(decoded[0], normalised(Image.fromarray(black.round().astype(np.uint8))), atol=0.02)


def test_grey_is_the_luma_of_bt_601() -> None:
    image = photo((60, 40))
    decoded = codec((60, 40), "L").decode("image/png", encoded(image, "PNG")).inputs[0]
    red, green, blue = np.asarray(image).astype(np.int64).transpose(2, 0, 1)
    luma = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    expected = (luma.astype(np.float32) / np.float32(255) - np.float32(0.3)) / np.float32(0.7)
    np.testing.assert_array_equal(decoded[0, 0], expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.875, 0.95])
def test_timm_prepares_the_same_bits(size: tuple[int, int], share: float) -> None:
    from leanserve.bases.sources.timm_model import imported_timm

    imported_timm()
    from timm.data import create_transform

    transform = create_transform((3, 224, 224), interpolation="bicubic", mean=MEAN, std=STD, crop_pct=share)
    image = photo(size)
    body = encoded(image, "JPEG")
    decoded = codec(fit="crop", crop=share, resize="bicubic").decode("image/jpeg", body).inputs[0]
    theirs = transform(Image.open(BytesIO(body)).convert("RGB")).numpy()
    np.testing.assert_array_equal(decoded[0], theirs)
