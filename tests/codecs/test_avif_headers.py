"""AVIF files by their frames: what the container hides counts, what encoders write costs its pixels."""

from __future__ import annotations

import struct
from io import BytesIO
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from leanserve.codecs.avif_headers import MOST_PARTS, av1_pixels, avif_work

if not features.check("avif"):
    pytest.skip("this Pillow was built without AVIF", allow_module_level=True)


Place = Literal["mdat", "idat"]


def encoded(size: tuple[int, int], mode: str = "RGB", **options: Any) -> bytes:
    stream = BytesIO()
    Image.new(mode, size, (10, 200, 30, 99)[: len(mode)]).save(stream, "AVIF", speed=10, **options)
    return stream.getvalue()


def animated(size: tuple[int, int], frames: int) -> bytes:
    more = [Image.new("RGB", size, (index, 0, 0)) for index in range(1, frames)]
    return encoded(size, save_all=True, append_images=more)


def box(kind: str, *content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + sum(map(len, content)), kind.encode()) + b"".join(content)


def still(*streams: bytes, pieces: int = 1, place: Place = "mdat", times: int = 1) -> bytes:
    """A container with one item per stream, in so many pieces; all items are listed `times` times."""
    inside = place == "idat"
    entries = b"".join(
        box("infe", struct.pack(">IHH4s", 2 << 24, 1 + index, 0, b"av01")) for index in range(len(streams) * times)
    )
    iinf = box("iinf", struct.pack(">IH", 0, len(streams) * times), entries)
    blob = b"".join(streams)
    fixed = 4 + len(iinf)

    def located(start: int) -> bytes:
        found, item = b"", 0
        for _ in range(times):
            at = start
            for stream in streams:
                item += 1
                sizes = [len(stream[index::pieces]) for index in range(pieces)]  # which add up to the whole
                found += struct.pack(">HHHH", item, int(inside), 0, pieces)
                for size in sizes:
                    found += struct.pack(">II", at, size)
                    at += size
        return box("iloc", struct.pack(">IHH", 1 << 24, 0x4400, len(streams) * times), found)

    size = len(located(0))
    head = box("ftyp", b"avif", bytes(4), b"avifmif1")
    idat = box("idat", blob) if inside else b""
    start = 0 if inside else len(head) + 8 + fixed + size + 8
    meta = box("meta", bytes(4), iinf, located(start), idat)
    return head + meta + (b"" if inside else box("mdat", blob))


def stream_of(content: bytes) -> bytes:
    """The AV1 stream of a still image without transparency as Pillow writes it: all of its last box."""
    return content[content.index(b"mdat") + 4 :]


SMALL = stream_of(encoded((64, 48)))
LARGE = stream_of(encoded((640, 480)))


@pytest.mark.parametrize("size", [(1, 1), (64, 48), (333, 200), (1000, 1)])
@pytest.mark.parametrize("options", [{}, {"subsampling": "4:4:4"}, {"quality": 100}], ids=str)
def test_an_image_counts_half_its_frame_and_one_with_transparency_its_pixels(
    size: tuple[int, int], options: dict[str, Any]
) -> None:
    pixels = size[0] * size[1]
    assert avif_work(encoded(size, **options)) == pixels // 2
    assert avif_work(encoded(size, "RGBA", **options)) == pixels


@pytest.mark.parametrize("frames", [2, 9])
def test_of_an_animation_the_first_frame_counts(frames: int) -> None:
    assert avif_work(animated((64, 48), frames)) == 64 * 48 // 2


def test_frames_larger_than_the_container_says_are_seen() -> None:
    """What Pillow opens as 16 x 16 is decoded as 640 x 480."""
    body = bytearray(encoded((640, 480)))
    at = body.index(b"ispe") + 8
    body[at : at + 8] = struct.pack(">II", 16, 16)
    image = Image.open(BytesIO(body))
    assert image.size == (16, 16)
    image.load()
    assert avif_work(bytes(body)) == 640 * 480 // 2


def test_frames_that_are_never_shown_are_counted() -> None:
    frame = LARGE[LARGE.index(b"\x32") :]  # the unit of type 6 that ends the stream
    assert av1_pixels(LARGE + frame * 99) == 100 * 640 * 480
    assert avif_work(still(LARGE + frame * 99)) == 100 * 640 * 480 // 2


@pytest.mark.parametrize("place", ["mdat", "idat"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_every_place_of_an_item_is_found(pieces: int, place: Place) -> None:
    assert avif_work(still(SMALL, pieces=pieces, place=place)) == 64 * 48 // 2
    assert avif_work(still(SMALL, LARGE, pieces=pieces, place=place)) == (64 * 48 + 640 * 480) // 2


def test_items_that_share_their_bytes_are_counted_each_until_it_is_enough() -> None:
    assert avif_work(still(LARGE, times=2)) == 640 * 480
    with pytest.raises(ValueError, match="their places overlap"):
        avif_work(still(LARGE, times=40))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds no AV1 image"),
        (box("ftyp", b"avif", bytes(4), b"mif1heic"), "holds no AV1 image"),
        (still(), "holds no AV1 image"),
        (still(SMALL)[:-1], "a box is cut short"),
        (still(SMALL[:-1]), "its AV1 stream is cut short"),
        (still(SMALL + b"\x12\x00" * MOST_PARTS), f"more than {MOST_PARTS} units"),
        (still(SMALL) + box("free") * MOST_PARTS, f"more than {MOST_PARTS} parts"),
        (box("meta", bytes(4), box("iloc", bytes(8)), box("iloc", bytes(8))), "two boxes iloc"),
        (box("meta", bytes(4), box("iinf", bytes(6)), box("iloc", bytes(8))), "have no length"),
        (struct.pack(">I4sQ", 1, b"ftyp", 5), "a box is cut short"),
    ],
    ids=["empty", "heic", "no item", "cut", "cut stream", "units", "boxes", "two iloc", "no length", "long box"],
)
def test_other_files_are_refused_with_the_reason(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        avif_work(content)


def test_a_full_sequence_header_with_every_option_is_read() -> None:
    """Timing, a model of the decoder and two operating points before the size, bit by bit as in the specification."""
    operating_point = "0" * 12 + "01000" + "1" + "1" + "0" * 11 + "1" + "0101"
    bits = "000" + "0" + "0"  # profile 0, no still image, no reduced header
    bits += "1" + "0" * 64 + "1" + "00101"  # timing; an Exp-Golomb number of two zeros
    bits += "1" + "00100" + "0" * 42  # the decoder's model, delays of five bits
    bits += "1" + "00001" + 2 * operating_point
    bits += "1001" + "1000" + f"{640 - 1:010b}" + f"{480 - 1:09b}"
    payload = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    header = bytes([1 << 3 | 2, len(payload)]) + payload
    assert av1_pixels(header + bytes([6 << 3])) == 640 * 480
    assert av1_pixels(header + bytes([3 << 3 | 4, 0])) == 640 * 480
    assert av1_pixels(header + bytes([4 << 3])) == 0


def test_every_cut_of_a_file_is_refused() -> None:
    whole = encoded((64, 48), "RGBA")
    for length in range(len(whole)):
        with pytest.raises(ValueError, match=r"cut short|no AV1|overlap"):
            avif_work(whole[:length])


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_any_file_is_weighed_or_refused(data: st.DataObject) -> None:
    whole = bytearray(data.draw(st.sampled_from(SAMPLES)))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=8)):
        whole[at] = value
    try:
        assert avif_work(bytes(whole)) >= 0
    except ValueError:
        return


SAMPLES = [encoded((64, 48), "RGBA"), animated((64, 48), 3), still(SMALL, pieces=3), still(SMALL, place="idat")]
