"""Letterbox, blue first and sizes that follow the image, held against torchvision; and what is told of them."""

from __future__ import annotations

from importlib import import_module
from io import BytesIO
from math import isclose
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from leanserve.bases.sources.python_imports import make_torchvision_importable
from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.geometry import Geometry
from leanserve.codecs.image_limits import ImageLimits
from leanserve.codecs.images import ImageCodec
from leanserve.config.base_section import ImageInput
from leanserve.contracts import Array, ModelSpec, Placement, RowsTogether, TensorSpec
from leanserve.errors import BadInput, BodyTooLarge

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZES = [(300, 200), (200, 300), (64, 48), (97, 131), (1, 60), (500, 3)]


LONG = ImageLimits(side=50_000)


def codec(size: tuple[int | None, int | None] = (64, 48), rows: RowsTogether = "any", **options: Any) -> ImageCodec:
    answers = AnswerEncoder(ModelSpec((), (TensorSpec("y", "float32", (2,)),), rows=rows))
    told: dict[str, Any] = {"mode": "RGB", "mean": MEAN, "std": STD} | options
    return ImageCodec(size=size, answers=answers, **told)


def photo(size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(size[0]).integers(0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def by_torchvision(image: Image.Image, canvas: tuple[int, int], fill: int, *, centred: bool) -> Array:
    """Resize within the canvas, pad, scale, normalise."""
    make_torchvision_importable()
    functional = import_module("torchvision.transforms.functional")
    share = min(canvas[0] / image.width, canvas[1] / image.height)
    wide, high = max(1, round(image.width * share)), max(1, round(image.height * share))
    small = functional.resize(image, [high, wide])
    left, top = ((canvas[0] - wide) // 2, (canvas[1] - high) // 2) if centred else (0, 0)
    padded = functional.pad(small, [left, top, canvas[0] - wide - left, canvas[1] - high - top], fill)
    return np.asarray(functional.normalize(functional.to_tensor(padded), list(MEAN), list(STD)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("anchor", ["center", "start"])
def test_letterbox_is_resize_and_pad_of_torchvision(size: tuple[int, int], anchor: Any) -> None:
    found = codec(fit="letterbox", anchor=anchor, fill=(114.0,)).decode("image/png", png(photo(size))).inputs[0]
    wanted = by_torchvision(photo(size), (64, 48), 114, centred=anchor == "center")
    np.testing.assert_allclose(found[0], wanted, rtol=0, atol=1e-6)


def test_blue_comes_first_and_statistics_are_in_that_order() -> None:
    image = photo((64, 48))
    found = codec(mode="BGR", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0)).decode("image/png", png(image)).inputs[0][0]
    red, green, blue = (np.asarray(plane, np.float32) / 255 for plane in image.split())
    np.testing.assert_allclose(found, [blue - 0.1, (green - 0.2) / 2, (red - 0.3) / 4], rtol=0, atol=1e-6)


def test_a_fill_may_have_a_value_per_channel_and_need_not_be_whole() -> None:
    options: dict[str, Any] = {"fit": "letterbox", "fill": (0.0, 127.5, 255.0), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    found = codec((10, 10), **options).decode("image/png", png(photo((10, 4)))).inputs[0][0]
    np.testing.assert_array_equal(found[:, 0, 0], [-1, 0, 1])


@pytest.mark.parametrize(
    ("rule", "image", "canvas", "scaled"),
    [
        (Geometry((None, 48), "letterbox", max_side=320), (100, 50), (96, 48), (96, 48)),
        (Geometry((None, 48), "letterbox", step=32, max_side=320), (100, 50), (96, 48), (96, 48)),
        (Geometry((None, 48), "letterbox", step=32, max_side=320), (101, 48), (128, 48), (101, 48)),
        (Geometry((None, 48), "letterbox", max_side=320), (1000, 48), (320, 48), (320, 15)),
        (Geometry((None, 48), "letterbox", least=64, max_side=320), (5, 48), (64, 48), (5, 48)),
        (Geometry((48, None), "stretch", max_side=320), (24, 30), (48, 60), (48, 60)),
        (Geometry((None, None), "stretch", step=32, max_side=640), (1280, 640), (640, 320), (640, 320)),
        (Geometry((None, None), "stretch", step=32, max_side=640), (100, 33), (128, 64), (128, 64)),
        (Geometry((None, None), "letterbox", step=32, max_side=640), (100, 33), (128, 64), (128, 42)),
        (Geometry((None, None), max_side=1000, step=32), (5000, 4990), (992, 992), (992, 992)),
    ],
)
def test_sides_that_follow_the_image(rule: Geometry, image: Any, canvas: Any, scaled: Any) -> None:
    found = rule.layout(image)
    assert (found.canvas, found.scaled) == (canvas, scaled)


@pytest.mark.parametrize("fit", ["letterbox", "crop", "stretch"])
@pytest.mark.parametrize("size", SIZES[:4])
def test_a_mark_is_found_where_the_placement_says(fit: Any, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size)
    x, y = size[0] // 2, size[1] // 2
    image.paste((255, 255, 255), (x - 3, y - 3, x + 3, y + 3))
    decoded = codec(fit=fit, mean=(0.0,) * 3, std=(1.0,) * 3).decode("image/png", png(image))
    (placed,) = decoded.places
    assert isinstance(placed, Placement)
    assert (placed.size, placed.input, decoded.tells_places) == (size, (64, 48), fit == "letterbox")
    light = decoded.inputs[0][0, 0]
    rows, columns = np.mgrid[: light.shape[0], : light.shape[1]] + 0.5
    seen = (light * columns).sum() / light.sum(), (light * rows).sum() / light.sum()
    for found, point, scale, offset in zip(seen, (x, y), placed.scale, placed.offset, strict=True):
        assert isclose(found, point * scale + offset, abs_tol=0.6)


def test_images_of_one_request_may_come_to_different_sizes() -> None:
    follows = codec((None, 48), fit="letterbox", max_side=320)
    form = {"inputs": [np.asarray(photo(size)).tolist() for size in [(60, 48), (100, 48)]]}
    decoded = follows.decode("application/json", str(form).replace("'", '"').encode())
    assert (decoded.inputs[0].shape, decoded.lengths) == ((2, 3, 48, 100), (60, 100))
    assert not decoded.inputs[0][0, :, :, 60:].any()
    alone = follows.decode("image/png", png(photo((60, 48)))).inputs[0]
    np.testing.assert_array_equal(decoded.inputs[0][0, :, :, :60], alone[0])


def test_sizes_that_may_not_share_a_batch_are_refused() -> None:
    follows = codec((None, None), "one_length", max_side=320)
    form = str({"inputs": [np.asarray(photo(size)).tolist() for size in [(60, 48), (100, 48)]]}).replace("'", '"')
    with pytest.raises(BadInput, match="inputs of 60 x 48 and 100 x 48 pixels"):
        follows.decode("application/json", form.encode())


@pytest.mark.parametrize("size", [(50_000, 1), (1, 50_000)])
@pytest.mark.parametrize("wanted", [(640, 640), (None, 48), (48, None), (None, None)])
def test_slivers_stay_bounded(size: tuple[int, int], wanted: Any) -> None:
    decoded = codec(wanted, fit="letterbox", max_side=2000, limits=LONG).decode(
        "image/png", png(Image.new("RGB", size))
    )
    assert decoded.inputs[0].size <= 3 * 2000 * 640


def test_what_is_filled_up_counts() -> None:
    small = codec((None, None), max_side=2000, step=1000, limits=ImageLimits(2_500_000))
    form = str({"inputs": [[[[0]]]] * 3}).replace("'", '"').encode()
    with pytest.raises(BodyTooLarge, match="3 images are above the limit of 2500000 pixels together"):
        small.decode("application/json", form)


def test_a_large_image_among_many_small_ones_is_no_bomb() -> None:
    follows = codec((None, None), max_side=2000, limits=ImageLimits(50_000_000))
    files = [("f", ("x.png", png(Image.new("L", size)))) for size in [(2000, 2000), *[(16, 16)] * 20]]
    request = httpx.Request("POST", "http://x/", files=files)
    with pytest.raises(BodyTooLarge, match="13 images are above the limit of 50000000 pixels together"):
        follows.decode(request.headers["content-type"], request.read())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fill": 114}, "fill has no effect without fit letterbox"),
        ({"fit": "crop", "anchor": "start"}, "anchor has no effect"),
        ({"fit": "stretch", "crop": 0.9}, "crop has no effect"),
        ({"max_side": 640}, "max_side has no effect without a null in size"),
        ({"fit": "crop", "size": (None, 48)}, "fit crop cuts to one size"),
        ({"fit": "letterbox", "fill": (1, 2)}, "fill is one pixel value, or 3"),
        ({"mode": "BGR", "mean": (0,), "std": (1,)}, "BGR needs 3 values"),
        ({"size": (0, 48)}, "greater than or equal to 1"),
    ],
)
def test_keys_without_effect_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ImageInput.model_validate({"size": (64, 48), "mean": MEAN, "std": STD} | options)
