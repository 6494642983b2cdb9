"""TIFF headers: what a page costs, and which kinds never reach a decoder."""

from __future__ import annotations

import zlib
from io import BytesIO
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from leanserve.codecs.tiff_headers import tiff_work
from tiff_pages import LONG, LONG8, grey, page

PIXELS = bytes(range(60))


@pytest.mark.parametrize(("order", "form"), [("<", "classic"), (">", "classic"), ("<", "big")])
def test_a_plain_page_costs_its_pixels(order: Literal["<", ">"], form: Literal["classic", "big"]) -> None:
    content = page(grey(10, 6), PIXELS, order, form=form)
    assert np.asarray(Image.open(BytesIO(content))).tobytes() == PIXELS, "Pillow reads the page as it is meant"
    assert tiff_work(content) == 60


@pytest.mark.parametrize(
    ("tags", "work"),
    [
        (grey(10, 6, t278=4, t273=(16, 56), t279=(40, 20)), 60),  # the last strip is shorter
        (grey(10, 6, t278=4_000_000_000), 60),  # more rows than there are
        (grey(10, 6, t278=(), t279=()), 60),
        (grey(10, 6, t273=(), t322=16, t323=16, t324=16, t325=256), 256),
        (grey(100, 60, t273=(), t322=64, t323=32, t324=(16,) * 4, t325=(2048,) * 4), 4 * 64 * 32),
        (grey(10, 6, t273=(), t322=60_000, t323=60_000, t324=16, t325=60), 3_600_000_000),
        (grey(10, 6, t258=(16,) * 3, t262=2, t277=3), 90),  # 48 bits per pixel, where 32 are usual
        (grey(10, 6, t258=(8,) * 3, t262=2, t277=3, t284=2, t273=(16, 76, 136), t279=(60,) * 3), 60),
        (grey(10, 6, t258=1), 60),
    ],
    ids=["strips", "one strip", "no rows", "tile", "tiles", "huge tile", "16 bits", "planes", "1 bit"],
)
def test_strips_tiles_and_depth_count(tags: Any, work: int) -> None:
    assert tiff_work(page(tags, PIXELS)) == work


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        (grey(10, 6, t256=()), "no width"),
        (grey(10, 6, t257=0), "no height"),
        (grey(10, 6, t259=7), "its compression is JPEG; decoded are none, CCITT, .*LZW, Deflate, PackBits$"),
        (grey(10, 6, t259=50001), "its compression is WebP"),
        (grey(10, 6, t259=12345), "its compression is 12345"),
        (grey(10, 6, t262=8), "its colours are of the kind 8"),
        (grey(10, 6, t258=12), "12 bits per channel"),
        (grey(10, 6, t258=32), "32 bits per channel"),
        (grey(10, 6, t258=16, t262=0), "16 bits per channel, white is zero"),
        (grey(10, 6, t258=32, t339=3), "signed or floating point"),
        (grey(10, 6, t339=2), "signed or floating point"),
        (grey(10, 6, t254=1), "a preview of another image, as in raw files of cameras"),
        (grey(10, 6, t278=5, t273=(16,) * 3), "has 3 strips or tiles where 2 cover the image"),
        (grey(10, 6, t322=16, t323=16, t324=16), "both strips and tiles"),
        (grey(10, 6, t273=(), t322=0, t323=16, t324=16), "its tiles have no size"),
        (grey(10, 6, t273=(), t322=16, t324=16), "its tiles have no size"),
    ],
)
def test_other_pages_are_refused_with_the_reason(tags: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        tiff_work(page(tags, PIXELS))


def test_a_tag_that_can_be_read_in_two_ways_is_refused() -> None:
    """A signed compression: libtiff would read JPEG where another reader sees nothing."""
    with pytest.raises(ValueError, match="the tag 259 twice, or not as a whole number"):
        tiff_work(page(grey(10, 6, t259=7), PIXELS, kinds={259: 8}))
    content = bytearray(page(grey(10, 6), PIXELS))
    at = content.index(b"\x03\x01\x03\x00")  # tag 259
    content[at : at + 2] = b"\x02\x01"
    with pytest.raises(ValueError, match="the tag 258 twice"):
        tiff_work(bytes(content))


def test_longer_types_are_read_too() -> None:
    assert tiff_work(page(grey(10, 6), PIXELS, kinds={256: LONG, 257: LONG, 262: 1})) == 60
    assert tiff_work(page(grey(10, 6), PIXELS, form="big", kinds={256: LONG8, 273: LONG8})) == 60


@pytest.mark.parametrize("side", [1 << 20, (1 << 32) - 1])
def test_strips_that_share_their_bytes_are_counted(side: int) -> None:
    """A million strips of one row cover a million rows, whatever they point to."""
    assert tiff_work(page(grey(4, side, t278=1, t273=(16, 16), t279=()), PIXELS)) == 4 * side


def test_every_cut_of_a_file_is_read_or_refused() -> None:
    whole = page(grey(10, 6, t258=(8,) * 3, t262=2, t277=3), PIXELS)
    for length in range(len(whole)):
        if length >= len(whole) - 10:  # only where the next page is may be missing
            continue
        with pytest.raises(ValueError, match=r"cut short|beyond the end"):
            tiff_work(whole[:length])


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_page_is_weighed_or_refused(data: st.DataObject) -> None:
    whole = bytearray(page(grey(10, 6), PIXELS, data.draw(st.sampled_from("<>")), form="big"))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=8)):
        whole[at] = value
    try:
        assert tiff_work(bytes(whole)) >= 0
    except ValueError:
        return


def test_what_scanners_and_programs_write_is_let_through() -> None:
    photo = Image.effect_noise((50, 40), 60)
    for mode, compression in (
        ("1", "group4"),
        ("1", "group3"),
        ("L", "tiff_lzw"),
        ("RGB", "tiff_adobe_deflate"),
        ("RGBA", "packbits"),
        ("CMYK", None),
        ("P", "tiff_deflate"),
    ):
        stream = BytesIO()
        photo.convert(mode).save(stream, "TIFF", compression=compression)
        assert tiff_work(stream.getvalue()) >= 2000, (mode, compression)


def test_a_tile_far_larger_than_the_image_is_a_bomb_that_is_seen() -> None:
    """About 4 KiB that libtiff would inflate to 4 MiB; the same with 4 GiB fits into a request."""
    side = 2048
    packed = zlib.compress(bytes(side * side), 9)
    content = page(grey(10, 6, t259=8, t273=(), t322=side, t323=side, t324=16, t325=len(packed)), packed)
    assert len(content) < 6000
    assert tiff_work(content) == side * side
