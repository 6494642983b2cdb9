"""Every format that is read: to the bit as documented, in every way of sending it, within bounds, and no other."""

from __future__ import annotations

import base64
import sys
from collections.abc import Callable
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from PIL import Image, ImageFile, features

from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.image_files import EncodedImage, OpenedImage
from leanserve.codecs.image_formats import FORMAT_NAMES, FORMATS, recognised
from leanserve.codecs.image_limits import ImageLimits
from leanserve.codecs.images import ImageCodec
from leanserve.contracts import Array, ModelSpec, TensorSpec
from leanserve.errors import BadInput, BodyTooLarge, UnsupportedMediaType
from tiff_pages import grey, page

ANSWERS = AnswerEncoder(ModelSpec((), (TensorSpec("logits", "float32", (2,), meaning="logits"),), ("a", "b")))
SIZE = (24, 16)
NORMAL: dict[str, Any] = {"size": SIZE, "resize": "nearest", "answers": ANSWERS}
CODEC = ImageCodec(mode="RGB", mean=(0,) * 3, std=(1,) * 3, **NORMAL)
GREY = ImageCodec(mode="L", mean=(0,), std=(1,), **NORMAL)
LIMIT = 1_000_000
BOUNDED = ImageCodec(mode="L", mean=(0,), std=(1,), limits=ImageLimits(LIMIT), **NORMAL)
LOSSLESS: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True, "exact": True}}
RANDOM = np.random.default_rng(3)
COLOURS = RANDOM.integers(0, 256, (*SIZE[::-1], 3), np.uint8)
ALPHA = RANDOM.integers(0, 256, SIZE[::-1], np.uint8)
DEEP = RANDOM.integers(0, 65536, SIZE[::-1], np.uint16)
INDICES = RANDOM.integers(0, 9, SIZE[::-1], np.uint8)
PALETTE = RANDOM.integers(0, 256, (9, 3), np.uint8)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = BytesIO()
    image.save(stream, form, **LOSSLESS.get(form, {}) | options)
    return stream.getvalue()


def levels(body: bytes, media_type: str = "", codec: ImageCodec = CODEC) -> Array:
    """What the model sees, back on the scale 0..255: [H, W, C]."""
    row = codec.decode(media_type, body).inputs[0][0]
    return np.asarray(np.round(row * 255).astype(np.uint8).transpose(1, 2, 0))


def on_black(colours: Array, alpha: Array) -> Array:
    """Composited on black."""
    return np.asarray(np.rint(colours.astype(np.float64) * alpha[..., None] / 255).astype(np.uint8))


def from_cmyk(inks: Array) -> Array:
    """Without a colour profile: what ink and black leave of the paper's white."""
    light = 255 - inks[..., 3:].astype(np.float64)
    return np.asarray((light - np.rint(inks[..., :3] * light / 255)).astype(np.uint8))


def grey_to_rgb(values: Array) -> Array:
    return np.repeat(values[..., None], 3, axis=2)


def paletted() -> Image.Image:
    image = Image.fromarray(INDICES).convert("P")
    image.putpalette(PALETTE.tobytes())
    image.putdata(INDICES.ravel().tolist())
    return image


RGBA = Image.fromarray(np.dstack([COLOURS, ALPHA]))
LA = Image.fromarray(np.dstack([COLOURS[..., 0], ALPHA]), "LA")
SHOWN: dict[str, tuple[Callable[[], Image.Image], Array, tuple[str, ...]]] = {
    "RGB": (lambda: Image.fromarray(COLOURS), COLOURS, ("PNG", "WEBP", "TIFF", "BMP")),
    "L": (lambda: Image.fromarray(ALPHA), grey_to_rgb(ALPHA), ("PNG", "WEBP", "GIF", "TIFF", "BMP")),
    "1": (
        lambda: Image.fromarray(ALPHA > 99),
        grey_to_rgb((ALPHA > 99) * np.uint8(255)),
        ("PNG", "GIF", "TIFF", "BMP"),
    ),
    "RGBA": (lambda: RGBA, on_black(COLOURS, ALPHA), ("PNG", "WEBP", "TIFF")),
    "LA": (lambda: LA, on_black(grey_to_rgb(COLOURS[..., 0]), ALPHA), ("PNG", "TIFF")),
    "I;16": (lambda: Image.fromarray(DEEP), grey_to_rgb((DEEP >> 8).astype(np.uint8)), ("PNG", "TIFF")),
    "P": (paletted, PALETTE[INDICES], ("PNG", "GIF", "TIFF", "BMP")),
    "CMYK": (lambda: Image.fromarray(np.asarray(RGBA), "CMYK"), from_cmyk(np.asarray(RGBA)), ("TIFF",)),
}
CASES = [(mode, form) for mode, (_, _, forms) in SHOWN.items() for form in forms]


@pytest.mark.parametrize(("mode", "form"), CASES, ids=[f"{mode} {form}" for mode, form in CASES])
def test_every_kind_of_pixel_becomes_what_is_documented(mode: str, form: str) -> None:
    make, expected, _ = SHOWN[mode]
    np.testing.assert_array_equal(levels(encoded(make(), form), f"image/{form.lower()}"), expected)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "I;16", "P", "CMYK"])
def test_compressed_tiff_is_the_same(mode: str, compression: str) -> None:
    make, expected, _ = SHOWN[mode]
    np.testing.assert_array_equal(levels(encoded(make(), "TIFF", compression=compression)), expected)


@pytest.mark.parametrize("compression", ["group3", "group4"])
def test_faxes_are_read(compression: str) -> None:
    make, expected, _ = SHOWN["1"]
    np.testing.assert_array_equal(levels(encoded(make(), "TIFF", compression=compression)), expected)


@pytest.mark.parametrize("order", ["<", ">"])
def test_of_sixteen_bits_per_colour_the_upper_eight_are_kept(order: Any) -> None:
    deep = RANDOM.integers(0, 65536, (*SIZE[::-1], 3), np.uint16)
    tags = grey(*SIZE, t258=(16,) * 3, t262=2, t277=3, t279=deep.nbytes)
    body = page(tags, deep.astype(f"{order}u2").tobytes(), order)
    np.testing.assert_array_equal(levels(body), (deep >> 8).astype(np.uint8))


def test_tiles_and_planes_of_a_tiff() -> None:
    tile = np.zeros((32, 32), np.uint8)
    tile[: SIZE[1], : SIZE[0]] = ALPHA
    tiled = page(grey(*SIZE, t273=(), t278=(), t279=(), t322=32, t323=32, t324=16, t325=1024), tile.tobytes())
    np.testing.assert_array_equal(levels(tiled), grey_to_rgb(ALPHA))
    size = SIZE[0] * SIZE[1]
    places = tuple(16 + size * plane for plane in range(3))
    tags = grey(*SIZE, t258=(8,) * 3, t262=2, t277=3, t284=2, t273=places, t279=(size,) * 3)
    np.testing.assert_array_equal(levels(page(tags, COLOURS.transpose(2, 0, 1).tobytes())), COLOURS)


def test_grey_that_is_multiplied_with_its_alpha_is_shown_as_it_is() -> None:
    """A TIFF may say so (ExtraSamples 1); Pillow divides again, which may be one off."""
    grey_and_alpha = np.dstack([np.minimum(COLOURS[..., 0], ALPHA), ALPHA])
    body = page(grey(*SIZE, t258=(8, 8), t277=2, t338=1, t279=grey_and_alpha.nbytes), grey_and_alpha.tobytes())
    shown = levels(body).astype(int)
    np.testing.assert_allclose(shown, grey_to_rgb(grey_and_alpha[..., 0]), atol=1)


def test_a_transparent_colour_of_a_gif_is_black() -> None:
    expected = np.where((INDICES == 4)[..., None], 0, PALETTE[INDICES])
    np.testing.assert_array_equal(levels(encoded(paletted(), "GIF", transparency=4)), expected)


PHOTO = Image.fromarray(COLOURS).resize((48, 32), Image.Resampling.BICUBIC).resize(SIZE)
LOSSY = {
    "jpeg": encoded(PHOTO, "JPEG"),
    "webp": encoded(PHOTO, "WEBP", lossless=False, exact=False),
    "avif": encoded(PHOTO, "AVIF", speed=10) if features.check("avif") else b"",
    "avif 4:4:4": encoded(PHOTO, "AVIF", speed=10, subsampling="4:4:4") if features.check("avif") else b"",
}
FILES = {
    "png": encoded(PHOTO, "PNG"),
    "jpeg": LOSSY["jpeg"],
    "webp": LOSSY["webp"],
    "avif": LOSSY["avif"],
    "gif": encoded(PHOTO, "GIF"),
    "tiff": encoded(PHOTO, "TIFF", compression="tiff_lzw"),
    "bmp": encoded(PHOTO, "BMP"),
}
MEDIA: dict[str, str] = {form.name: form.media_type for form in FORMATS}
avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
every_format = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=avif if name == "avif" else ()) for name in FORMAT_NAMES]
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=avif if n.startswith("avif") else ()) for n in LOSSY])
def test_lossy_files_become_what_pillow_decodes(name: str) -> None:
    theirs = np.asarray(Image.open(BytesIO(LOSSY[name])).convert("RGB"))
    np.testing.assert_array_equal(levels(LOSSY[name]), theirs)
    np.testing.assert_array_equal(
        levels(LOSSY[name], codec=GREY)[..., 0], np.asarray(Image.fromarray(theirs).convert("L"))
    )


@pytest.mark.parametrize("form", [pytest.param("AVIF", marks=avif), "WEBP"])
def test_lossy_transparency_is_composited_on_black(form: str) -> None:
    body = encoded(RGBA, form, lossless=False) if form == "WEBP" else encoded(RGBA, form, speed=10)
    theirs = np.asarray(Image.open(BytesIO(body)))
    assert theirs.shape[2] == 4
    np.testing.assert_array_equal(levels(body), on_black(theirs[..., :3], theirs[..., 3]))


@pytest.mark.parametrize("form", [pytest.param("AVIF", marks=avif), "WEBP", "GIF", "TIFF", "PNG"])
def test_the_first_frame_or_page_is_read(form: str) -> None:
    more = [Image.new("RGB", SIZE, (index, 0, 0)) for index in range(20)]
    options = {"speed": 10} if form == "AVIF" else {}
    body = encoded(PHOTO, form, save_all=True, append_images=more, **options)
    first = Image.open(BytesIO(body))
    assert getattr(first, "n_frames", 1) == 21
    np.testing.assert_array_equal(levels(body), np.asarray(first.convert("RGB")))
    assert not np.array_equal(levels(body), levels(encoded(more[0], form, **options)))


@every_format
def test_every_way_of_sending_a_file_is_the_same(name: str) -> None:
    body, expected = FILES[name], levels(FILES[name])
    for media_type in ("", "image/*", "application/octet-stream", MEDIA[name], f"{MEDIA[name].upper()}; q=1"):
        np.testing.assert_array_equal(levels(body, media_type), expected)
    text = base64.b64encode(body).decode()
    for value in ({"b64": text}, f"data:{MEDIA[name]};base64,{text}", {"b64": f"data:;base64,{text}"}):
        np.testing.assert_array_equal(levels(orjson.dumps({"inputs": value}), "application/json"), expected)
    parts: tuple[Any, ...] = (
        (f"x.{name}", body, MEDIA[name]),
        ("x", body, "application/octet-stream"),
        ("x", body, ""),
    )
    for part in parts:
        sent = httpx.Request("POST", "http://host/", files={"file": part})
        np.testing.assert_array_equal(levels(sent.read(), sent.headers["content-type"]), expected)


@pytest.mark.parametrize(
    ("media_type", "name"),
    [("image/x-ms-bmp", "bmp"), ("image/tif", "tiff"), ("image/jpg", "jpeg"), ("image/pjpeg", "jpeg")],
)
def test_names_that_are_no_media_types_but_widely_sent_are_taken(media_type: str, name: str) -> None:
    np.testing.assert_array_equal(levels(FILES[name], media_type), levels(FILES[name]))


@every_format
def test_a_file_is_seen_by_the_decoder_of_its_format_alone(name: str) -> None:
    """Whatever else it is declared to be is refused by its first bytes."""
    found = recognised(FILES[name])
    assert found is not None
    assert found.name == name
    for other in FORMATS:
        if other.name != name:
            told = f"the body .* is sent as {other.media_type}, but begins like {MEDIA[name]}"
            with pytest.raises(BadInput, match=told):
                CODEC.decode(other.media_type, FILES[name])


@every_format
def test_cut_files_are_refused_with_the_place(name: str) -> None:
    body = FILES[name]
    for length in (0, 3, 20, len(body) // 2, len(body) * 9 // 10):
        with pytest.raises(BadInput, match=r"^inputs"):
            levels(orjson.dumps({"inputs": {"b64": base64.b64encode(body[:length]).decode()}}), "application/json")


def bomb(name: str) -> bytes:
    """A small file of at least 1200 x 1200 pixels."""
    options: dict[str, Any] = {"speed": 10} if name == "avif" else {}
    if name == "bmp":
        return encoded(Image.new("1", (1200, 1200)), "BMP")
    if name == "tiff":
        options["compression"] = "tiff_adobe_deflate"
    return encoded(Image.new("RGB", (1200, 1200)), name.upper(), **options)


@every_format
def test_bombs_are_refused_before_a_pixel_is_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("its pixels were decoded"))
    body = bomb(name)
    assert len(body) < 200_000
    with pytest.raises(BodyTooLarge, match="the body: the image has 1200 x 1200 pixels, above the limit of 1000000"):
        BOUNDED.decode(MEDIA[name], body)


def test_work_that_the_size_does_not_tell_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("its pixels were decoded"))
    tiled = page(grey(10, 6, t273=(), t279=(), t322=2048, t323=2048, t324=16, t325=64), bytes(64))
    with pytest.raises(
        BodyTooLarge, match=r"to decode its 10 x 6 pixels is as much work as 4194304 of them are, above"
    ):
        BOUNDED.decode("image/tiff", tiled)


def test_files_of_a_form_are_refused_as_soon_as_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some decoders take memory for all pixels when they read the header."""
    seen: list[str] = []
    real = ImageCodec._opened

    def opened(self: ImageCodec, file: EncodedImage) -> OpenedImage:
        seen.append(file.where)
        return real(self, file)

    monkeypatch.setattr(ImageCodec, "_opened", opened)
    flat = encoded(Image.new("RGB", (700, 700)), "WEBP")
    sent = httpx.Request("POST", "http://host/", files=[("f", (f"{index}.webp", flat)) for index in range(20)])
    with pytest.raises(BodyTooLarge, match="3 images are above the limit"):
        BOUNDED.decode(sent.headers["content-type"], sent.read())
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (encoded(PHOTO, "TIFF", compression="jpeg"), "its compression is JPEG; decoded are none, CCITT"),
        (encoded(Image.fromarray(DEEP.astype(np.float32)), "TIFF"), "signed or floating point numbers"),
        (encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), "signed or floating point numbers"),
        (page(grey(*SIZE, t258=12)), "its pixels have 12 bits per channel"),
        (FILES["bmp"][:30] + b"\x01" + FILES["bmp"][31:], "run-length encoded"),
    ],
    ids=["jpeg in tiff", "float", "32 bit", "12 bit", "rle"],
)
def test_kinds_that_are_not_decoded_say_why(body: bytes, reason: str) -> None:
    with pytest.raises(BadInput, match=rf"^the body \(\d+ bytes\) cannot be read as image/(tiff|bmp): .*{reason}"):
        CODEC.decode("", body)


def test_formats_can_be_switched_off() -> None:
    codec = ImageCodec(mode="L", mean=(0,), std=(1,), formats=("png", "webp"), **NORMAL)
    assert codec.media_types[:3] == ("image/png", "image/webp", "image/*")
    for name in ("png", "webp"):
        assert codec.decode(MEDIA[name], FILES[name]).inputs[0].shape == (1, 1, *SIZE[::-1])
    with pytest.raises(UnsupportedMediaType, match="'image/gif' is none of image/png, image/webp, "):
        codec.decode("image/gif", FILES["gif"])
    with pytest.raises(BadInput, match=r"the body is image/gif, which is none of image/png, image/webp$"):
        codec.decode("", FILES["gif"])


def test_a_format_that_this_pillow_lacks_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(feature: str) -> bool:
        return feature != "avif"

    monkeypatch.setattr(features, "check", check)
    assert "image/avif" not in CODEC.media_types
    said = "image/avif is not read here, because this machine's Pillow was built without avif; send another format"
    with pytest.raises(UnsupportedMediaType, match=said):
        CODEC.decode("image/avif", b"")
    with pytest.raises(BadInput, match=f"the body: {said}"):
        CODEC.decode("", b"\0\0\0\x20ftypavif")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not list the libraries of a process")
def test_a_damaged_fax_says_nothing_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    """libtiff would write a line per row into the log of the service."""
    body = encoded(SHOWN["1"][0](), "TIFF", compression="group4")
    for at in range(8, 40):
        try:
            levels(body[:at] + b"\xff\0\xaa" + body[at + 3 :], "image/tiff")
        except BadInput:
            continue
    assert capfd.readouterr().err == ""


@avif
def test_avif_takes_one_thread_as_all_decoders_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import AvifImagePlugin

    threads = []
    real = AvifImagePlugin._avif.AvifDecoder  # type: ignore[attr-defined]

    def watched(data: bytes, codec: str, count: int) -> Any:
        threads.append(count)
        return real(data, codec, count)

    monkeypatch.setattr(AvifImagePlugin._avif, "AvifDecoder", watched)  # type: ignore[attr-defined]
    levels(FILES["avif"])
    assert threads == [1]
