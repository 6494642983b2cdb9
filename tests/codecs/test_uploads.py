"""Files as forms and as base64: what browsers, curl and HTTP libraries send, and what nobody should."""

from __future__ import annotations

import base64
from io import BytesIO

import httpx
import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.images import ImageCodec
from leanserve.contracts import Decoded, ModelSpec, TensorSpec
from leanserve.errors import BadInput, BodyTooLarge, UnsupportedMediaType

ANSWERS = AnswerEncoder(ModelSpec((), (TensorSpec("logits", "float32", (2,), meaning="logits"),), ("a", "b")))
CODEC = ImageCodec(mode="RGB", size=(4, 4), mean=(0,) * 3, std=(1,) * 3, answers=ANSWERS)
JSON = "application/json"


def encoded(form: str, grey: int = 77) -> bytes:
    stream = BytesIO()
    Image.new("RGB", (8, 8), (grey, 2 * grey, 3 * grey)).save(stream, form)
    return stream.getvalue()


PNG, JPEG, OTHER = encoded("PNG"), encoded("JPEG"), encoded("PNG", 11)
PART = b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n'
ALONE = {PNG: CODEC.decode("image/png", PNG).inputs[0], OTHER: CODEC.decode("image/png", OTHER).inputs[0]}


def form(*files: tuple[str, tuple[str | None, bytes] | tuple[str | None, bytes, str]]) -> Decoded:
    """What an HTTP library makes of these files, decoded."""
    request = httpx.Request("POST", "http://host/", files=list(files))
    return CODEC.decode(request.headers["content-type"], request.read())


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def as_json(inputs: object) -> Decoded:
    return CODEC.decode(JSON, orjson.dumps({"inputs": inputs}))


@pytest.mark.parametrize(
    "part",
    [
        ("file", ("photo.png", PNG)),
        ("any name", ("photo.png", PNG, "image/png")),
        ("x", ("unknown", PNG, "application/octet-stream")),
        ("x", ("PHOTO.PNG", PNG, "IMAGE/PNG; charset=binary")),
        ("naïve", ('größe "quoted".png', PNG)),
        ("plain", (None, PNG)),
    ],
    ids=["by ending", "declared", "undeclared", "capitals", "umlauts", "no file name"],
)
def test_a_form_with_one_file_is_one_image(part: tuple[str, tuple[str, bytes]]) -> None:
    decoded = form(part)
    assert not decoded.many
    np.testing.assert_array_equal(decoded.inputs[0], ALONE[PNG])


def test_a_form_with_more_files_is_a_list_in_their_order() -> None:
    decoded = form(("a", ("1.png", OTHER)), ("a", ("2.png", PNG)), ("b", ("3.jpg", JPEG)))
    assert decoded.many
    np.testing.assert_array_equal(decoded.inputs[0][:2], np.concatenate([ALONE[OTHER], ALONE[PNG]]))
    np.testing.assert_array_equal(decoded.inputs[0][2:], CODEC.decode("image/jpeg", JPEG).inputs[0])


def test_an_image_may_hold_what_looks_like_a_boundary() -> None:
    body = PNG + b"\r\n--bound\r\n--boundarx\r\n"  # what follows the last chunk of a PNG is nobody's business
    content = b'--boundary\r\nContent-Disposition: form-data; name="f"\r\n\r\n' + body + b"\r\n--boundary--\r\n"
    np.testing.assert_array_equal(
        CODEC.decode('multipart/form-data; boundary="boundary"', content).inputs[0], ALONE[PNG]
    )


@pytest.mark.parametrize(
    ("content_type", "body", "message"),
    [
        ("multipart/form-data", b"--x--\r\n", "needs the parameter boundary"),
        ("multipart/form-data; boundary=", b"--x--\r\n", "needs the parameter boundary"),
        ("multipart/form-data; boundary=" + "x" * 999, b"", "cannot be read"),
        ("multipart/form-data; boundary=x", b"", "cannot be read: Unexpected end"),
        ("multipart/form-data; boundary=x", b"--y\r\n\r\n--y--\r\n", "the form cannot be read"),
        ("multipart/form-data; boundary=x", b"--x--\r\n", "the form has no part"),
        ("multipart/form-data; boundary=x", PART + PNG, "cannot be read: Unexpected end"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\n" + PNG, "Missing Content-Disposition"),
        ("multipart/form-data; boundary=x", b"--x\r\nbad header\r\n\r\n--x--\r\n", "cannot be read"),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"A: b\r\n" * 99 + b"\r\n--x--\r\n", "16 headers|cannot be"),
        ("multipart/form-data; boundary=x", b"--x\r\nA: " + b"b" * 9000 + b"\r\n\r\n--x--\r\n", "4096|cannot be read"),
    ],
    ids=[
        "no boundary",
        "empty boundary",
        "long boundary",
        "empty",
        "other boundary",
        "no part",
        "cut",
        "part of no form",
        "bad header",
        "many headers",
        "long header",
    ],
)
def test_a_damaged_form_is_refused_with_the_reason(content_type: str, body: bytes, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        CODEC.decode(content_type, body)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (("note.txt", b"hello"), r"part 1 of the form \(note.txt\) is sent as text/plain, which is none of image/png"),
        ((None, b"hello"), r"part 1 of the form \(b\) \(5 bytes\) begins like none of image/png, image/jpeg"),
        (("", b"", ""), r"part 1 of the form \(b\) \(0 bytes\) begins like none of"),
        (("x.png", JPEG), r"part 1 .* is sent as image/png, but begins like image/jpeg$"),
        (("x.png", PNG[:-30]), r"part 1 of the form \(x.png\): the PNG image \(8 x 8\) cannot be decoded"),
        (("x.svg", b"<svg/>"), r"sent as image/svg\+xml, which is none of image/png, image/jpeg"),
        (("x.gif", b"GIF89a"), r"part 1 of the form \(x.gif\) \(6 bytes\) cannot be read as image/gif"),
    ],
)
def test_a_part_that_is_no_image_is_named(file: tuple[str | None, bytes], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        form(("a", ("good.png", PNG)), ("b", file))


@pytest.mark.parametrize(
    "value",
    [
        {"b64": b64(PNG)},
        {"b64": base64.encodebytes(PNG).decode()},
        {"b64": f"data:image/png;base64,{b64(PNG)}"},
        {"b64": f"data:;base64,{b64(PNG)}"},
        f"data:image/png;charset=binary;base64,{b64(PNG)}",
        f"data:IMAGE/PNG;BASE64,{b64(PNG)}",
    ],
    ids=["b64", "with line breaks", "data URL", "data URL without type", "data URL alone", "capitals"],
)
def test_base64_is_the_file(value: object) -> None:
    one, many = as_json(value), as_json([value, {"b64": b64(OTHER)}])
    assert (one.many, many.many, as_json([value]).many) == (False, True, True)
    np.testing.assert_array_equal(one.inputs[0], ALONE[PNG])
    np.testing.assert_array_equal(many.inputs[0], np.concatenate([ALONE[PNG], ALONE[OTHER]]))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, 'inputs: a file is {"b64": "its bytes in base64"}'),
        ({"b64": 1}, "inputs: a file is"),
        ({"b64": "", "name": "x"}, "inputs: a file is"),
        ({"b64": "?"}, "inputs: not base64"),
        ({"b64": "ä"}, "inputs: not base64"),
        ({"b64": b64(PNG)[:-3]}, "inputs: not base64: "),
        ({"b64": b64(PNG) + "!"}, "inputs: not base64: "),
        ({"b64": b64(b"hello")}, r"inputs \(5 bytes\) begins like none of"),
        ({"b64": f"data:image/webp;base64,{b64(PNG)}"}, r"inputs .* is sent as image/webp, but begins like image/png"),
        ("data:image/png," + b64(PNG), "inputs: a data URL must be"),
        ("data:image/png;base64", "inputs: a data URL must be"),
        ([{"b64": b64(PNG)}, {"b64": "?"}], r"inputs\[1\]: not base64"),
        ([{"b64": b64(PNG)}, [[1]]], r"inputs\[1\] is no encoded file"),
        ([[[1]], {"b64": b64(PNG)}], r"inputs\[0\] is no encoded file"),
    ],
)
def test_bad_base64_is_refused_with_the_place(value: object, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        as_json(value)


@pytest.mark.parametrize("content_type", ["", "image/*", "application/octet-stream", "Image/*; q=1"])
def test_a_body_of_no_certain_type_is_what_it_begins_like(content_type: str) -> None:
    np.testing.assert_array_equal(CODEC.decode(content_type, PNG).inputs[0], ALONE[PNG])
    np.testing.assert_array_equal(
        CODEC.decode(content_type, JPEG).inputs[0], CODEC.decode("image/jpeg", JPEG).inputs[0]
    )
    with pytest.raises(BadInput, match=r"the body \(5 bytes\) begins like none of image/png, image/jpeg"):
        CODEC.decode(content_type, b"hello")


def test_a_common_misspelling_of_jpeg_is_taken() -> None:
    assert CODEC.decode("image/jpg", JPEG).inputs[0].shape == (1, 3, 4, 4)


def test_an_uncertain_type_does_not_open_other_decoders() -> None:
    stream = BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PPM")
    with pytest.raises(BadInput, match="begins like none of"):
        CODEC.decode("image/*", stream.getvalue())
    with pytest.raises(UnsupportedMediaType):
        CODEC.decode("image/x-portable-pixmap", stream.getvalue())


PIECES = st.sampled_from(
    [
        b"--x",
        b"--",
        b"\r\n",
        b"\r\n\r\n",
        b"Content-Type: image/png",
        b"Content-Disposition: form-data; name=",
        PNG,
        b'"',
    ]
)


@settings(deadline=None, max_examples=300)
@given(st.lists(PIECES | st.binary(max_size=4), max_size=12).map(b"".join))
def test_any_form_is_decoded_or_refused(body: bytes) -> None:
    try:
        decoded = CODEC.decode("multipart/form-data; boundary=x", b"--x\r\n" + body + b"\r\n--x--\r\n")
    except (BadInput, BodyTooLarge):
        return
    assert decoded.inputs[0].shape[1:] == (3, 4, 4)
