"""What the first page of a TIFF file says of itself, read before Pillow and libtiff see the file.

TIFF is a family of formats, and its headers ask for work that has nothing to do with the size of the image: a tile of
60,000 x 60,000 pixels around an image of 10 x 10, a million strips that all are the same bytes, a JPEG or WebP stream
inside. So only what scanners, cameras and programs for images write is let through, and the tiles are counted.

Source: TIFF revision 6.0 (Adobe, 1992); BigTIFF has the same tags with longer numbers (Pillow reads it little-endian).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from struct import Struct, error, unpack_from
from typing import Final, NamedTuple

SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 256, 257, 258, 259, 262
STRIPS, SAMPLES, ROWS_PER_STRIP, PLANAR = 273, 277, 278, 284
TILE_WIDTH, TILE_HEIGHT, TILES, SAMPLE_FORMAT = 322, 323, 324, 339
CHECKED: Final = frozenset(
    {SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, STRIPS, SAMPLES, ROWS_PER_STRIP, PLANAR}
    | {TILE_WIDTH, TILE_HEIGHT, TILES, SAMPLE_FORMAT}
)
COMPRESSIONS: Final = {
    1: "none",
    2: "CCITT",
    3: "CCITT fax 3",
    4: "CCITT fax 4",
    5: "LZW",
    8: "Deflate",
    32773: "PackBits",
    32946: "Deflate",
}
"""Those that are decoded. Not among them are JPEG, WebP, JPEG 2000 and others that would open one more decoder."""
OTHERS: Final = {6: "old JPEG", 7: "JPEG", 34925: "LZMA", 34712: "JPEG 2000", 50000: "Zstandard", 50001: "WebP"}
PHOTOMETRICS: Final = {0: "white is zero", 1: "black is zero", 2: "RGB", 3: "palette", 5: "CMYK"}
_NUMBERS: Final = {1: "B", 3: "H", 4: "I", 16: "Q"}
"""Types of whole numbers, as `struct` calls them."""


class TiffTag(NamedTuple):
    """How many values a tag has, and the first of them."""

    values: int
    first: int


def tiff_work(content: bytes) -> int:
    """Pixels that decoding the first page goes over: all of its strips or tiles, wide pixels counted by their bytes.

    Raises:
        ValueError: the header is damaged, or the page is of a kind that is not decoded; the text says which.
    """
    tags = first_page(content)
    missing = [name for name, tag in (("width", WIDTH), ("height", HEIGHT)) if _first(tags, tag) < 1]
    if missing:
        raise ValueError(f"its first page has no {missing[0]}")
    _require_known_kind(tags)
    samples, bits = _first(tags, SAMPLES, 1), _first(tags, BITS, 1)
    planes = samples if _first(tags, PLANAR, 1) == 2 else 1
    pixels, cells = _covered(tags)
    given = max((tags[tag].values for tag in (STRIPS, TILES) if tag in tags), default=0)
    if given > cells * planes:
        raise ValueError(f"its first page has {given} strips or tiles where {cells * planes} cover the image")
    return pixels * max(32, samples * bits) // 32


def first_page(content: bytes) -> Mapping[int, TiffTag]:
    """The tags of the first page that decide how much work it is.

    Raises:
        ValueError: the header is cut short or damaged, or one of these tags could be read in two ways.
    """
    order = "<" if content.startswith(b"II") else ">"
    number = Struct(order + "H")
    try:
        big = number.unpack_from(content, 2)[0] == 43
        at = unpack_from(order + ("Q" if big else "I"), content, 8 if big else 4)[0]
        count = unpack_from(order + ("Q" if big else "H"), content, at)[0]
        entry = Struct(order + ("HHQ8s" if big else "HHI4s"))
        start = at + (8 if big else 2)
        if start + count * entry.size > len(content):
            raise ValueError("its first page is cut short")
        found: dict[int, TiffTag] = {}
        for tag, kind, values, field in entry.iter_unpack(content[start : start + count * entry.size]):
            if tag not in CHECKED:
                continue
            if tag in found or kind not in _NUMBERS:
                raise ValueError(f"its first page has the tag {tag} twice, or not as a whole number")
            found[tag] = TiffTag(values, _value(content, order, _NUMBERS[kind], values, field))
    except (error, OverflowError) as damage:
        raise ValueError("its header is cut short") from damage
    return found


def _value(content: bytes, order: str, kind: str, values: int, field: bytes) -> int:
    """The first value of an entry: within it, or where it points to if there are more than fit."""
    size = Struct(order + kind).size
    if not values:
        return 0
    if size * values <= len(field):
        return int(unpack_from(order + kind, field)[0])
    at = unpack_from(order + ("Q" if len(field) == 8 else "I"), field)[0]
    if at + size * values > len(content):
        raise ValueError("its first page points beyond the end of the file")
    return int(unpack_from(order + kind, content, at)[0])


def _first(tags: Mapping[int, TiffTag], tag: int, otherwise: int = 0) -> int:
    return tags[tag].first if tag in tags else otherwise


def _require_known_kind(tags: Mapping[int, TiffTag]) -> None:
    compression, photometric = _first(tags, COMPRESSION, 1), _first(tags, PHOTOMETRIC)
    bits, form = _first(tags, BITS, 1), _first(tags, SAMPLE_FORMAT, 1)
    if _first(tags, SUBFILE) & 1:
        raise ValueError("its first page is a preview of another image, as in raw files of cameras")
    if compression not in COMPRESSIONS:
        kinds = ", ".join(dict.fromkeys(COMPRESSIONS.values()))
        raise ValueError(f"its compression is {OTHERS.get(compression, compression)}; decoded are {kinds}")
    if photometric not in PHOTOMETRICS:
        raise ValueError(f"its colours are of the kind {photometric}; decoded are {', '.join(PHOTOMETRICS.values())}")
    if form != 1:
        raise ValueError("its pixels are signed or floating point numbers, whose black and white no header tells")
    if bits not in {1, 2, 4, 8, 16} or (bits == 16 and photometric == 0):
        wanted = "1, 2, 4, 8 or 16 bits are decoded, 16 where black is zero"
        raise ValueError(f"its pixels have {bits} bits per channel, {PHOTOMETRICS[photometric]}; {wanted}")


def _covered(tags: Mapping[int, TiffTag]) -> tuple[int, int]:
    """Pixels of all strips or tiles, and how many of these cover the image once; tiles are whole at its edges too."""
    width, height = _first(tags, WIDTH), _first(tags, HEIGHT)
    if {TILE_WIDTH, TILES} & tags.keys():
        if STRIPS in tags:
            raise ValueError("its first page has both strips and tiles")
        wide, high = _first(tags, TILE_WIDTH), _first(tags, TILE_HEIGHT)
        if not wide or not high:
            raise ValueError("its tiles have no size")
        tiles = ceil(width / wide) * ceil(height / high)
        return wide * high * tiles, tiles
    return width * height, ceil(height / min(_first(tags, ROWS_PER_STRIP, height) or height, height))
