"""The image formats that are read: how each is named, recognised and decoded.

Only the decoder of one format ever sees a file: of the declared one, or of the one that its first bytes tell where the
sender did not say. Decoders are libraries in C with a history of holes, so that an operator may switch formats off
(`base.image.formats`).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Final, Literal, get_args

from PIL import AvifImagePlugin, features
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from leanserve.codecs.avif_headers import avif_work
from leanserve.codecs.tiff_headers import tiff_work

FormatName = Literal["png", "jpeg", "webp", "avif", "gif", "tiff", "bmp"]
FORMAT_NAMES: Final[tuple[FormatName, ...]] = get_args(FormatName)
HEAD: Final = 16
"""First bytes of a file that tell its format."""


def _pixels_alone(_: bytes) -> int:
    return 0


def _bmp_work(content: bytes) -> int:
    """None beyond the pixels; run-length encoded files are refused, which Pillow decodes at Python's pace."""
    compression = int.from_bytes(content[30:34], "little") if content[14:15] != b"\x0c" else 0
    if compression in {1, 2}:
        raise ValueError("its pixels are run-length encoded; decoded are BMP files that are not compressed")
    return 0


@dataclass(frozen=True, slots=True)
class ImageFormat:
    """One format."""

    name: FormatName
    media_types: tuple[str, ...]
    """The registered one first, then others that are widely sent."""
    decoder: Callable[[BytesIO], ImageFile]
    """Reads the header; pixels are decoded when they are asked for."""
    begins: re.Pattern[bytes]
    endings: tuple[str, ...]
    work: Callable[[bytes], int] = _pixels_alone
    """From the content, before a decoder sees it: pixels that decoding goes over where the image's size does not tell.

    Raises `ValueError` for damaged headers, and for kinds of the format that are not decoded.
    """
    pixel_s: float = 30e-9
    """Seconds to decode a pixel of a photo, and to bring it into the model's mode."""
    library: str | None = None
    """Pillow's name of the library without which it may have been built."""

    @property
    def media_type(self) -> str:
        """The registered one."""
        return self.media_types[0]

    @property
    def readable(self) -> bool:
        """Whether this machine's Pillow has the library."""
        return self.library is None or bool(features.check(self.library))

    @property
    def unreadable(self) -> str:
        """What to do where it is not."""
        return (
            f"{self.media_type} is not read here, because this machine's Pillow was built without {self.library}; send "
            "another format, or install a Pillow that has it"
        )


def _avif(stream: BytesIO) -> ImageFile:
    # Like all other decoders it gets one thread; by itself it would take every core from the model.
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    return AvifImagePlugin.AvifImageFile(stream)


def _tiff(stream: BytesIO) -> ImageFile:
    _quieten_libtiff()
    return TiffImageFile(stream)


@cache
def _quieten_libtiff() -> None:
    """libtiff writes what it finds wrong to stderr, of a fax a line per row; the sender is told, and the log is ours.

    Its own switch is the one way to stop that. It is found among the libraries of this process, which only Linux lists.
    """
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for path in set(re.findall(r"/\S*libtiff[^/\s]*\.so\S*", mapped)):
        ctypes.CDLL(path).TIFFSetErrorHandler(None)


def _starting(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.DOTALL)


FORMATS: Final = (
    ImageFormat("png", ("image/png", "image/x-png"), PngImageFile, _starting(rb"\x89PNG\r\n\x1a\n"), (".png",)),
    ImageFormat(
        "jpeg",
        ("image/jpeg", "image/jpg", "image/pjpeg"),
        JpegImageFile,
        _starting(rb"\xff\xd8\xff"),
        (".jpg", ".jpeg", ".jpe", ".jfif"),
        pixel_s=12e-9,
    ),
    ImageFormat("webp", ("image/webp",), WebPImageFile, _starting(rb"RIFF....WEBP"), (".webp",), library="webp"),
    ImageFormat(
        "avif",
        ("image/avif", "image/avif-sequence"),
        _avif,
        _starting(rb"....ftyp(?:avif|avis|mif1|msf1)"),
        (".avif", ".avifs"),
        avif_work,
        library="avif",
    ),
    ImageFormat("gif", ("image/gif",), GifImageFile, _starting(rb"GIF8[79]a"), (".gif",), pixel_s=15e-9),
    ImageFormat(
        "tiff",
        ("image/tiff", "image/tif", "image/x-tiff"),
        _tiff,
        _starting(rb"II[*+]\0|MM\0[*]"),
        (".tif", ".tiff"),
        tiff_work,
        pixel_s=15e-9,
    ),
    ImageFormat(
        "bmp",
        ("image/bmp", "image/x-ms-bmp", "image/x-bmp"),
        BmpImageFile,
        _starting(rb"BM.{4}\0{4}"),
        (".bmp",),
        _bmp_work,
        pixel_s=10e-9,
    ),
)
"""All of them, in the order in which errors list them."""
BY_MEDIA_TYPE: Final = {media_type: format_ for format_ in FORMATS for media_type in format_.media_types}
ENDINGS: Final = frozenset(ending for format_ in FORMATS for ending in format_.endings)


def recognised(content: bytes) -> ImageFormat | None:
    """The format that the first `HEAD` bytes of a file tell, or `None`."""
    return next((format_ for format_ in FORMATS if format_.begins.match(content)), None)


def endings(names: Collection[FormatName]) -> str:
    """Of files in these formats, for an error."""
    return ", ".join(sorted(ending for format_ in FORMATS if format_.name in names for ending in format_.endings))


def media_types(names: Collection[FormatName]) -> tuple[str, ...]:
    """The registered media types of these formats, as far as this machine reads them."""
    return tuple(format_.media_type for format_ in FORMATS if format_.name in names and format_.readable)
