"""How much work an AVIF file is, from its boxes and AV1 headers alone.

An AVIF file is a container of AV1 frames, and decoders believe the frames: a container that declares 16 x 16 pixels may
hold frames of 16,000 x 16,000 that are decoded whole and then scaled down, and hundreds of frames that are never shown.
Neither fits a bound on the size that the container declares, so the frames are counted here.

Sources: ISO/IEC 14496-12 (boxes), 23008-12 (items), AV1 Bitstream & Decoding Process Specification (5.3 to 5.5).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

MOST_PARTS: Final = 10_000
"""Items, pieces of an item, or units of a stream; cameras and encoders write a few, or some hundred for large grids."""
USUAL_FRAMES: Final = 2
"""One of colour, one of transparency."""
SEQUENCE_HEADER, FRAME_HEADER, FRAME = 1, 3, 6
"""Types of an AV1 unit; of the others none starts a frame."""
READ_BOXES: Final = frozenset({b"iinf", b"iloc", b"idat", b"stsz", b"stco", b"co64"})


def avif_work(content: bytes) -> int:
    """Pixels that decoding the first image goes over; colour and transparency of one size count once together.

    Raises:
        ValueError: the file is cut short or damaged, or holds no AV1 image.
    """
    streams = _Streams(content)
    totals = [sum(map(av1_pixels, found)) for found in (streams.of_items(), streams.of_tracks())]
    if not any(totals):
        raise ValueError("it holds no AV1 image")
    return max(totals) // USUAL_FRAMES


def av1_pixels(stream: bytes) -> int:
    """Pixels of all frames in an AV1 stream, each as large as the largest that its headers allow.

    Raises:
        ValueError: the stream is cut short, or of more units than any image has.
    """
    largest = frames = 0
    for kind, payload in _units(stream):
        if kind == SEQUENCE_HEADER:
            largest = max(largest, _largest_frame(payload))
        frames += kind in {FRAME, FRAME_HEADER}
    return largest * frames


class Box(NamedTuple):
    """One box of the container, as a range of the file's bytes without its header."""

    kind: bytes
    start: int
    end: int


class _Reader:
    """Whole numbers from a range of bytes, big-endian. Raises `ValueError` at its end."""

    def __init__(self, content: bytes, start: int, end: int) -> None:
        self._content, self._at, self._end = content, start, end

    def take(self, size: int) -> int:
        if self._at + size > self._end:
            raise ValueError("a box is cut short")
        self._at += size
        return int.from_bytes(self._content[self._at - size : self._at], "big")


class _Streams:
    """Finds the AV1 streams of a container: those of its still images, and the first of each of its tracks."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._left = 2 * len(content)
        """Bytes that streams may have together: they hardly ever share one."""

    def of_items(self) -> Iterator[bytes]:
        """The streams of all still images: colour, transparency, the cells of a grid, thumbnails."""
        for meta in self._boxes("meta"):
            inner = self._inner(meta.start + 4, meta.end)
            if b"iinf" in inner and b"iloc" in inner:
                images = _av1_items(self._content, inner[b"iinf"])
                places = _item_places(self._content, inner[b"iloc"], inner.get(b"idat"))
                yield from (self._joined(pieces) for item, pieces in places if item in images)

    def of_tracks(self) -> Iterator[bytes]:
        """The first frame of each track."""
        for table in self._boxes("moov", "trak", "mdia", "minf", "stbl"):
            inner = self._inner(table.start, table.end)
            at = next((inner[kind] for kind in (b"stco", b"co64") if kind in inner), None)
            if at is not None and b"stsz" in inner:
                yield self._joined([_first_sample(self._content, inner[b"stsz"], at)])

    def _inner(self, start: int, end: int) -> dict[bytes, Box]:
        """The boxes within a range by their kinds, none of which may come twice."""
        found: dict[bytes, Box] = {}
        for box in _boxes(self._content, start, end):
            if box.kind in found and box.kind in READ_BOXES:
                raise ValueError(f"it has two boxes {box.kind.decode()} where one is allowed")
            found[box.kind] = box
        return found

    def _boxes(self, *path: str) -> list[Box]:
        """All boxes at a path from the top."""
        found = [Box(b"", 0, len(self._content))]
        for kind in path:
            found = [
                box
                for outer in found
                for box in _boxes(self._content, outer.start, outer.end)
                if box.kind == kind.encode()
            ]
        return found

    def _joined(self, pieces: list[tuple[int, int]]) -> bytes:
        self._left -= sum(size for _, size in pieces)
        if self._left < 0 or any(start + size > len(self._content) for start, size in pieces):
            raise ValueError("its images are cut short, or their places overlap")
        return b"".join(self._content[start : start + size] for start, size in pieces)


def _boxes(content: bytes, start: int, end: int) -> Iterator[Box]:
    for _ in range(MOST_PARTS):
        if start >= end:
            return
        head = _Reader(content, start, end)
        size, kind = head.take(4), head.take(4).to_bytes(4, "big")
        long = size == 1
        size = head.take(8) if long else size or end - start
        if size < (16 if long else 8) or start + size > end:
            raise ValueError("a box is cut short")
        yield Box(kind, start + (16 if long else 8), start + size)
        start += size
    raise ValueError(f"it is made of more than {MOST_PARTS} parts")


def _av1_items(content: bytes, box: Box) -> set[int]:
    """The numbers of the items that are AV1 streams."""
    wide = _Reader(content, box.start, box.end).take(1) > 0
    found = set()
    for entry in _boxes(content, box.start + (8 if wide else 6), box.end):
        head = _Reader(content, entry.start, entry.end)
        version = head.take(4) >> 24
        item = head.take(4 if version >= 3 else 2)
        head.take(2)
        if head.take(4) == int.from_bytes(b"av01", "big"):
            found.add(item)
    return found


def _item_places(content: bytes, box: Box, idat: Box | None) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Each item with its pieces: where they start in the file, and their bytes."""
    head = _Reader(content, box.start, box.end)
    version = head.take(4) >> 24
    sizes = head.take(2)
    offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    if not length_size:
        raise ValueError("its images have no length")
    parts = 0
    for _ in range(head.take(4 if version >= 2 else 2)):
        item = head.take(4 if version >= 2 else 2)
        method = head.take(2) & 15 if version else 0
        head.take(2)
        base = head.take(base_size) + (idat.start if method == 1 and idat else 0)
        count = head.take(2)
        parts += 1 + count
        if parts > MOST_PARTS:
            raise ValueError(f"it is made of more than {MOST_PARTS} parts")
        pieces = []
        for _ in range(count):
            head.take(index_size if version else 0)
            pieces.append((base + head.take(offset_size), head.take(length_size)))
        yield item, pieces


def _first_sample(content: bytes, sizes: Box, places: Box) -> tuple[int, int]:
    """Where the first frame of a track starts, and its bytes."""
    head = _Reader(content, sizes.start + 4, sizes.end)
    common, count = head.take(4), head.take(4)
    if count > MOST_PARTS:
        raise ValueError(f"it is made of more than {MOST_PARTS} parts")
    size = common or (head.take(4) if count else 0)
    at = _Reader(content, places.start + 4, places.end)
    wide = 8 if places.kind == b"co64" else 4
    return (at.take(wide) if at.take(4) else 0), size


def _units(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and payload of each unit (OBU) of a stream."""
    at = 0
    for _ in range(MOST_PARTS):
        if at >= len(stream):
            return
        head = stream[at]
        at += 2 if head & 4 else 1  # an extension of one byte
        size = len(stream) - at
        if head & 2:
            size, at = _leb128(stream, at)
        if not 0 <= size <= len(stream) - at:
            raise ValueError("its AV1 stream is cut short")
        yield head >> 3 & 15, stream[at : at + size]
        at += size
    raise ValueError(f"its AV1 stream has more than {MOST_PARTS} units")


def _leb128(stream: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits per byte, and where it ends."""
    number = 0
    for place, byte in enumerate(stream[at : at + 8]):
        number |= (byte & 127) << 7 * place
        if not byte & 128:
            return number, at + place + 1
    raise ValueError("its AV1 stream is damaged")


class _Bits:
    """Bits of a header, the first one first; those beyond its end are zeros."""

    def __init__(self, payload: bytes) -> None:
        self._value = int.from_bytes(payload[:512].ljust(512, b"\0"), "big")
        self._left = 512 * 8

    def take(self, size: int) -> int:
        self._left -= size
        return self._value >> self._left & ((1 << size) - 1)


def _largest_frame(payload: bytes) -> int:
    """Pixels of the largest frame that a sequence header allows."""
    bits = _Bits(payload)
    bits.take(4)  # profile, still image
    if bits.take(1):  # reduced header of a still image
        bits.take(5)
    else:
        _skip_operating_points(bits)
    wide, high = bits.take(4) + 1, bits.take(4) + 1
    return (bits.take(wide) + 1) * (bits.take(high) + 1)


def _skip_operating_points(bits: _Bits) -> None:
    delay = 0
    if bits.take(1):  # timing
        bits.take(64)
        if bits.take(1):
            _skip_exp_golomb(bits)
        if bits.take(1):  # model of a decoder
            delay = bits.take(5) + 1
            bits.take(42)
    display = bits.take(1)
    for _ in range(bits.take(5) + 1):
        bits.take(12)
        if bits.take(5) > 7:
            bits.take(1)
        if delay and bits.take(1):
            bits.take(2 * delay + 1)
        if display and bits.take(1):
            bits.take(4)


def _skip_exp_golomb(bits: _Bits) -> None:
    zeros = 0
    while zeros < 32 and not bits.take(1):
        zeros += 1
    if zeros < 32:
        bits.take(zeros)
