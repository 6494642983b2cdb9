"""Files that are small and ask for much: what they would cost is known before a pixel is decoded."""

from __future__ import annotations

import weakref
from io import BytesIO

import orjson
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from leanserve.codecs import image_files
from leanserve.codecs import images as image
from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.image_files import OpenedImage
from leanserve.codecs.image_limits import ImageLimits
from leanserve.codecs.images import ImageCodec
from leanserve.contracts import ModelSpec, TensorSpec
from leanserve.errors import BadInput, BodyTooLarge

LABELS = ("a", "b")
ANSWERS = AnswerEncoder(ModelSpec((), (TensorSpec("logits", "float32", (2,), meaning="logits"),), LABELS))
LIMIT = 1_000_000
LIMITS = ImageLimits(LIMIT, side=LIMIT)
STRETCHED = ImageCodec(mode="L", size=(32, 32), mean=(0,), std=(1,), answers=ANSWERS, limits=LIMITS)
CROPPED = ImageCodec(mode="L", size=(32, 32), mean=(0,), std=(1,), answers=ANSWERS, limits=LIMITS, fit="crop")


def encoded(width: int, height: int, form: str = "PNG", *, progressive: bool = False) -> bytes:
    stream = BytesIO()
    Image.new("L", (width, height), 128).save(stream, form, progressive=progressive)
    return stream.getvalue()


def form_of(*files: bytes) -> tuple[str, bytes]:
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n' + file + b"\r\n" for file in files
    ]
    return "multipart/form-data; boundary=x", b"".join(parts) + b"--x--\r\n"


def with_scans(scans: int, side: int) -> bytes:
    """A progressive JPEG whose last scan is sent again and again: fourteen bytes each, and all pixels to go over."""
    body = encoded(side, side, "JPEG", progressive=True)
    last = body[body.rindex(b"\xff\xda") : -2]
    return body[:-2] + last * (scans - body.count(b"\xff\xda")) + body[-2:]


@pytest.mark.parametrize("codec", [STRETCHED, CROPPED])
def test_the_limit_is_for_the_pixels_of_an_image_as_sent(codec: ImageCodec) -> None:
    codec.decode("image/png", encoded(1000, 1000))
    with pytest.raises(BodyTooLarge, match="the image has 1001 x 1000 pixels, above the limit of 1000000 pixels"):
        codec.decode("image/png", encoded(1001, 1000))


def test_all_images_of_a_request_share_the_limit() -> None:
    half = encoded(700, 700)
    assert STRETCHED.decode(*form_of(half, half)).inputs[0].shape == (2, 1, 32, 32)
    with pytest.raises(BodyTooLarge, match="3 images are above the limit of 1000000 pixels together"):
        STRETCHED.decode(*form_of(half, half, half))


def test_a_tiny_image_counts_as_much_as_the_model_sees() -> None:
    most = LIMIT // (32 * 32)
    tiny = encoded(1, 1)
    assert len(STRETCHED.decode(*form_of(*[tiny] * most)).inputs[0]) == most
    with pytest.raises(BodyTooLarge, match=f"more parts than the {most}"):
        STRETCHED.decode(*form_of(*[tiny] * (most + 1)))
    with pytest.raises(BodyTooLarge, match=f"{most + 1} images are more than the {most}"):
        STRETCHED.decode("application/json", orjson.dumps({"inputs": [{"b64": ""}] * (most + 1)}))


def test_a_tall_image_is_refused_before_its_rows_are_widened() -> None:
    STRETCHED.decode("image/png", encoded(1, LIMIT // 32))
    with pytest.raises(BodyTooLarge, match="1 x 40000 pixels become 1280000 on the way to the size of the model's"):
        STRETCHED.decode("image/png", encoded(1, 40_000))
    with pytest.raises(BodyTooLarge, match="inputs: 1 x 40000 pixels become"):
        STRETCHED.decode("application/json", orjson.dumps({"inputs": [[0]] * 40_000}))


def test_a_sliver_is_refused_before_its_short_side_is_stretched() -> None:
    for size in ((1, 2000), (2000, 1)):
        with pytest.raises(BodyTooLarge, match="become 2048000 on the way"):
            CROPPED.decode("image/png", encoded(*size))
    for size in ((1, 500), (500, 1)):
        assert CROPPED.decode("image/png", encoded(*size)).inputs[0].shape == (1, 1, 32, 32)


def test_scans_of_a_jpeg_count_as_work() -> None:
    assert STRETCHED.decode("image/jpeg", with_scans(100, 300)).inputs[0].shape == (1, 1, 32, 32)
    with pytest.raises(BodyTooLarge, match="300 x 300 pixels in 120 scans are as much work as 1080000 pixels in 10"):
        STRETCHED.decode("image/jpeg", with_scans(120, 300))
    assert encoded(1000, 1000, "JPEG", progressive=True).count(b"\xff\xda") <= 10  # what encoders write is taken


def test_a_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = encoded(3000, 3000)
    assert len(bomb) < 20_000
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("its pixels were decoded"))
    with pytest.raises(BodyTooLarge, match="3000 x 3000"):
        STRETCHED.decode("image/png", bomb)


def test_an_image_without_pixels_is_refused() -> None:
    body = bytearray(encoded(5, 7, "JPEG"))
    frame = body.index(b"\xff\xc0")
    body[frame + 7 : frame + 9] = bytes(2)
    with pytest.raises(BadInput, match=r"the body \(\d+ bytes\) "):
        STRETCHED.decode("image/jpeg", bytes(body))


def test_images_are_let_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Image.Image]] = []
    alive: list[int] = []

    def watched(image: OpenedImage, mode: str, orientation: image_files.Orientation) -> Image.Image:
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(image.image))
        return image_files.decoded(image, mode, orientation)

    monkeypatch.setattr(image, "decoded", watched)
    STRETCHED.decode(*form_of(*[encoded(200, 200)] * 12))
    assert alive == [0] * 12
