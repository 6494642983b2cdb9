"""The image codec: the same numbers as the base's data, clear refusals, and nothing else on hostile bytes."""

from __future__ import annotations

import json
import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.image_limits import ImageLimits
from leanserve.codecs.images import ImageCodec
from leanserve.contracts import Array, ModelSpec, TensorSpec
from leanserve.errors import BackendFailed, BadInput, BodyTooLarge, ConfigError, UnsupportedMediaType
from leanserve_models import digits


def of(labels: tuple[str, ...]) -> AnswerEncoder:
    return AnswerEncoder(ModelSpec((), (TensorSpec("logits", "float32", (len(labels),), meaning="logits"),), labels))


CODEC = open_base(Origin.shipped("digits")).codec
PLAIN = ImageCodec(mode="L", size=(2, 1), mean=(0,), std=(1,), answers=of(("a", "b")), resize="nearest")
COLOUR = ImageCodec(mode="RGB", size=(2, 1), mean=(0, 0, 0), std=(1, 1, 1), answers=of(("a", "b")), resize="nearest")


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def as_json(inputs: Any) -> bytes:
    return orjson.dumps({"inputs": inputs}, option=orjson.OPT_SERIALIZE_NUMPY)


def levels(codec: ImageCodec, body: bytes, media_type: str = "image/png") -> list[Any]:
    """Decoded pixels of one image, back on the scale 0..255."""
    return np.round(codec.decode(media_type, body).inputs[0][0] * 255).astype(int).tolist()  # type: ignore[no-any-return]


def header_only(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    ihdr = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + ihdr + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.fixture(scope="module")
def samples() -> tuple[Array, Array]:
    """Some digits as sent, uint8 [rows, 8, 8], and as the base's data, float32 [rows, 1, 32, 32]."""
    return digits.images("test", 20)[0], digits.data("test", 20)[0][0]


def test_png_decodes_to_the_bits_of_the_data(samples: tuple[Array, Array]) -> None:
    for image, row in zip(*samples, strict=True):
        decoded = CODEC.decode("image/png", encoded(Image.fromarray(image)))
        assert not decoded.many
        assert decoded.inputs[0].dtype == np.float32
        np.testing.assert_array_equal(decoded.inputs[0], row[None])


def test_json_pixels_decode_to_the_bits_of_the_data(samples: tuple[Array, Array]) -> None:
    images, rows = samples
    one = CODEC.decode("application/json", as_json(images[0].tolist()))
    many = CODEC.decode("Application/JSON; charset=utf-8", as_json(images.tolist()))
    assert not one.many
    assert many.many
    np.testing.assert_array_equal(one.inputs[0], rows[:1])
    np.testing.assert_array_equal(many.inputs[0], rows)


def test_jpeg_decodes_to_what_pillow_decodes(samples: tuple[Array, Array]) -> None:
    body = encoded(Image.fromarray(samples[0][0]).resize((640, 480)), "JPEG")
    through_png = encoded(Image.open(BytesIO(body)))
    np.testing.assert_array_equal(
        CODEC.decode("image/jpeg", body).inputs[0], CODEC.decode("image/png", through_png).inputs[0]
    )


def test_colour_planes_come_first_and_are_normalised_each() -> None:
    codec = ImageCodec(mode="RGB", size=(1, 1), mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25), answers=of(("a",)))
    pixels = codec.decode("image/png", encoded(Image.new("RGB", (3, 3), (255, 255, 0)))).inputs[0]
    np.testing.assert_array_equal(pixels, np.array([1, 1, -4], dtype=np.float32).reshape(1, 3, 1, 1))


RED_AND_CLEAR = Image.fromarray(np.array([[[255, 0, 0, 255], [255, 255, 255, 0]]], dtype=np.uint8))


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(np.array([[256 * 200, 65535]], dtype=np.uint16)), [200, 255]),
        (Image.fromarray(np.array([[True, False]])), [255, 0]),
        (RED_AND_CLEAR, [76, 0]),
        (RED_AND_CLEAR.convert("LA"), [76, 0]),
        (RED_AND_CLEAR.convert("RGB").convert("P"), [76, 255]),
    ],
    ids=["16-bit", "1-bit", "alpha", "grey-alpha", "palette"],
)
def test_every_kind_of_png_becomes_grey(image: Image.Image, expected: list[int]) -> None:
    assert levels(PLAIN, encoded(image)) == [[expected]]


def test_a_transparent_palette_colour_is_black() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 255, 255, 255, 255, 255])
    palette.putpixel((1, 0), 1)
    assert levels(PLAIN, encoded(palette, transparency=1)) == [[[255, 0]]]


def test_a_cmyk_jpeg_becomes_colour() -> None:
    body = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    red, green, blue = np.array(levels(COLOUR, body, "image/jpeg"))[:, 0, 0]
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ([[7, 8.0]], [[[7, 8]]] * 3),
        ([[[7], [8]]], [[[7, 8]]] * 3),
        ([[[1, 2, 3], [4, 5, 6]]], [[[1, 4]], [[2, 5]], [[3, 6]]]),
        ([[[1, 2, 3, 255], [4, 5, 6, 0]]], [[[1, 0]], [[2, 0]], [[3, 0]]]),
    ],
)
def test_json_images_of_one_three_or_four_channels(inputs: Any, expected: Any) -> None:
    decoded = COLOUR.decode("application/json", as_json(inputs))
    assert not decoded.many
    assert np.round(decoded.inputs[0][0] * 255).tolist() == expected


def test_json_lists_hold_images_of_different_size_and_kind() -> None:
    images = [[[9, 9], [9, 9]], [[[8, 8, 8], [8, 8, 8]]]]
    decoded = PLAIN.decode("application/json", as_json(images))
    assert decoded.many
    assert np.round(decoded.inputs[0] * 255).tolist() == [[[[9, 9]]], [[[8, 8]]]]
    assert PLAIN.decode("application/json", as_json([images[1]])).many


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"inputs": [[NaN, 1]]}', "not valid JSON"),
        (b"[[1, 2]]", 'a JSON object with the key "inputs"'),
        (b'{"input": [[1, 2]]}', 'a JSON object with the key "inputs"'),
        (b'{"inputs": [[1, 2]], "labels": 1}', "unknown key 'labels'"),
        (as_json("image"), "inputs: expected rows of pixels .* got a single value"),
        (as_json([]), "inputs: .* got an empty list"),
        (as_json([[]]), "inputs: .* got an empty list"),
        (as_json([[[]]]), r"inputs\[0\]: .* got an empty list"),
        (as_json([1, 2]), "inputs: .* got nested lists of 2 entries"),
        (as_json([[[[[1]]]]]), "inputs: .* got nested lists of 1 x 1 x 1 x 1 x 1 entries"),
        (as_json([[1, 2], [3]]), r"inputs\[1\]: expected 2 entries as in the first list, got 1"),
        (as_json([[1, 2], 3]), r"inputs\[1\]: expected a list of 2 entries, got 3"),
        (as_json([[1, 2], ["3", 4]]), r'inputs\[1\]\[0\]: expected a number, got "3"'),
        (as_json([[1, None]]), r"inputs\[0\]\[1\]: expected a number, got null"),
        (as_json([[1, True]]), r"inputs\[0\]\[1\]: expected a number, got true"),
        (as_json([[1, [2]]]), r"inputs\[0\]\[1\]: expected a number, got \[2\]"),
        (as_json([[1, 256]]), r"inputs\[0\]\[1\]: pixels are whole numbers 0..255, got 256"),
        (as_json([[1, -1]]), r"inputs\[0\]\[1\]: pixels are whole numbers 0..255, got -1"),
        (as_json([[1, 0.5]]), r"inputs\[0\]\[1\]: pixels are whole numbers 0..255, got 0.5"),
        (as_json([[[1, 2, 3], [1, 2]]]), r"inputs\[0\]\[1\]: expected 3 entries"),
        (as_json([[[1, 2], [3, 4]], [[1, 2], [3]]]), r"inputs\[1\]\[1\]: expected 2 entries"),
        (as_json([[[[1, 2], [3, 4]]]]), r"inputs\[0\]: a pixel has 1, 3 or 4 channels, not 2"),
        (as_json([[[[0]]], {"b64": ""}]), r"inputs\[0\] is no encoded file as others in the list are"),
        (as_json([{"b64": ""}, [[0]]]), r"inputs\[1\] is no encoded file"),
        (as_json([[1] * 2, ["x" * 99] * 2]), r'inputs\[1\]\[0\]: expected a number, got "x{36}\.\.\.$'),
    ],
)
def test_bad_json_is_refused_with_the_place(body: bytes, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        PLAIN.decode("application/json", body)


@pytest.mark.parametrize(
    ("media_type", "body", "message"),
    [
        ("image/png", b"", r"the body \(0 bytes\) is sent as image/png, but does not begin like one"),
        ("image/png", b"hello", "does not begin like one"),
        ("image/png", encoded(Image.new("L", (4, 4)), "JPEG"), "but begins like image/jpeg"),
        ("image/jpeg", encoded(Image.new("L", (4, 4))), "but begins like image/png"),
        ("image/png", encoded(Image.effect_noise((64, 64), 50))[:2000], r"PNG image \(64 x 64\) cannot be decoded"),
        ("image/jpeg", encoded(Image.effect_noise((64, 64), 50), "JPEG")[:-900], r"JPEG image \(64 x 64\) cannot be"),
    ],
    ids=["empty", "text", "jpeg-as-png", "png-as-jpeg", "truncated-png", "truncated-jpeg"],
)
def test_bad_files_are_refused_with_the_reason(media_type: str, body: bytes, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        PLAIN.decode(media_type, body)


@pytest.mark.parametrize(("width", "height"), [(8000, 8000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_a_huge_image_is_refused_from_its_header(width: int, height: int) -> None:
    with pytest.raises(BodyTooLarge, match=f"the body: the image has {width} x {height} pixels, above the limit"):
        PLAIN.decode("image/png", header_only(width, height))


def test_json_images_are_bounded_by_what_they_inflate_to() -> None:
    codec = ImageCodec(
        mode="L", size=(32, 32), mean=(0,), std=(1,), answers=of(("a",)), limits=ImageLimits(3 * 32 * 32)
    )
    assert len(codec.decode("application/json", as_json([[[0, 0]]] * 3)).inputs[0]) == 3
    with pytest.raises(BodyTooLarge, match="4 images"):
        codec.decode("application/json", as_json([[[0, 0]]] * 4))


def test_other_media_types_are_refused_with_those_there_are() -> None:
    with pytest.raises(UnsupportedMediaType, match="'image/heic' is none of image/png, image/jpeg, image/webp, "):
        CODEC.decode("image/heic", b"ftypheic")


def test_encode_gives_the_label_and_its_softmax() -> None:
    answers = PLAIN.encode((np.log(np.array([[1, 3], [4, 1]], dtype=np.float32)),))
    assert [answer["label"] for answer in answers] == ["b", "a"]
    assert answers[0]["scores"] == pytest.approx({"b": 0.75, "a": 0.25})
    assert orjson.loads(orjson.dumps(answers)) == answers


def test_encode_survives_huge_and_half_precision_logits() -> None:
    answer = PLAIN.encode((np.array([[3e38, -3e38]], dtype=np.float32),))[0]
    assert answer == {"label": "a", "scores": {"a": 1.0, "b": 0.0}}
    half = PLAIN.encode((np.array([[60000, 60000]], dtype=np.float16),))[0]
    assert half["scores"] == {"a": 0.5, "b": 0.5}


def test_encode_tells_the_best_five_of_many_labels() -> None:
    labels = tuple(f"class {index}" for index in range(21))
    codec = ImageCodec(mode="L", size=(1, 1), mean=(0,), std=(1,), answers=of(labels))
    answer = codec.encode((np.arange(21, dtype=np.float32)[None],))[0]
    assert list(answer["scores"]) == ["class 20", "class 19", "class 18", "class 17", "class 16"]
    assert 0.99 < sum(answer["scores"].values()) < 1


def test_a_class_that_is_ruled_out_has_no_share() -> None:
    answer = PLAIN.encode((np.array([[0, -np.inf]], dtype=np.float32),))
    assert answer == [{"label": "a", "scores": {"a": 1.0, "b": 0.0}}]


@pytest.mark.parametrize("row", [[0, np.nan], [0, np.inf], [-np.inf, -np.inf]])
def test_encode_refuses_logits_without_probabilities(row: list[float]) -> None:
    with pytest.raises(BackendFailed, match="not finite in row 1"):
        PLAIN.encode((np.array([[0, 0], row], dtype=np.float32),))


def test_encode_refuses_logits_that_are_not_one_per_label() -> None:
    with pytest.raises(BackendFailed, match=r"\(1, 3\) logits for 2 labels"):
        PLAIN.encode((np.zeros((1, 3), dtype=np.float32),))


def test_a_codec_that_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="mode RGB needs 3 values"):
        ImageCodec(mode="RGB", size=(1, 1), mean=(0,), std=(1,), answers=of(("a",)))
    with pytest.raises(ConfigError, match="labels must differ"):
        ImageCodec(mode="L", size=(1, 1), mean=(0,), std=(1,), answers=of(("crane", "crane")))


FILES = {
    "image/png": [
        encoded(Image.effect_noise((9, 7), 80)),
        encoded(Image.effect_noise((9, 7), 80).convert("P"), transparency=3),
        encoded(RED_AND_CLEAR),
        encoded(Image.fromarray(np.arange(6, dtype=np.uint16).reshape(2, 3))),
    ],
    "image/jpeg": [encoded(Image.effect_noise((9, 7), 80), "JPEG"), encoded(Image.new("CMYK", (9, 7)), "JPEG")],
    "image/webp": [encoded(RED_AND_CLEAR, "WEBP"), encoded(Image.effect_noise((9, 7), 80), "WEBP", lossless=True)],
    "image/gif": [encoded(Image.effect_noise((9, 7), 80).convert("P"), "GIF", transparency=3)],
    "image/tiff": [
        encoded(Image.effect_noise((9, 7), 80), "TIFF"),
        encoded(RED_AND_CLEAR, "TIFF", compression="tiff_lzw"),
        encoded(Image.effect_noise((9, 7), 80).convert("1"), "TIFF", compression="group4"),
    ],
    "image/bmp": [encoded(Image.effect_noise((9, 7), 80), "BMP"), encoded(Image.new("RGB", (9, 7)), "BMP")],
}
if features.check("avif"):
    FILES["image/avif"] = [encoded(RED_AND_CLEAR, "AVIF"), encoded(Image.effect_noise((9, 7), 80), "AVIF", speed=10)]
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.integers(0, 255)
NESTED = st.recursive(VALUES, lambda inner: st.lists(inner, max_size=4), max_leaves=30)


@st.composite
def damaged_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A real file with some bytes replaced and perhaps its end cut off."""
    media_type = draw(st.sampled_from(sorted(FILES)))
    body = bytearray(draw(st.sampled_from(FILES[media_type])))
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(body) - 1), st.integers(0, 255)), max_size=6)):
        body[place] = value
    return media_type, bytes(body[: draw(st.integers(0, len(body)))] if draw(st.booleans()) else body)


BODIES = st.one_of(
    st.tuples(st.sampled_from(CODEC.media_types), st.binary(max_size=200)),
    damaged_files(),
    NESTED.map(lambda value: ("application/json", json.dumps({"inputs": value}).encode())),
)


@settings(deadline=None, max_examples=400)
@given(BODIES)
def test_any_body_is_decoded_or_refused(request_body: tuple[str, bytes]) -> None:
    try:
        decoded = CODEC.decode(*request_body)
    except (BadInput, BodyTooLarge):
        return
    (array,) = decoded.inputs
    assert array.shape[1:] == (1, 32, 32)
    assert array.dtype == np.float32
    assert np.isfinite(array).all()
