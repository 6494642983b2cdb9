"""Bodies that are small and ask for much, one generator for each kind of decoder: nothing here is stored, all is made.

Each is what one client may send within `limits.body_bytes` (16 MiB). Sizes are those at which earlier versions of this
service, or other servers, stopped answering.
"""

from __future__ import annotations

import base64
import gzip
import struct
import zlib
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Final, NamedTuple
from zipfile import ZIP_DEFLATED, ZipFile

from PIL import Image, features

MB: Final = 2**20
MOST: Final = 16 * MB
JSON = "application/json"
JSON_LENGTH = "inference-header-content-length"
PREDICT, INFER = "/v1/predict", "/v2/models/{model}/infer"


class Bomb(NamedTuple):
    """What is sent where."""

    path: str
    content_type: str
    body: bytes
    headers: tuple[str, ...] = ()

    def request(self, model: str) -> bytes:
        """As it goes over the wire."""
        lines = [
            f"POST {self.path.format(model=model)} HTTP/1.1",
            "host: x",
            f"content-type: {self.content_type}",
            f"content-length: {len(self.body)}",
            *self.headers,
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + self.body


def predict_with(body: bytes, content_type: str = JSON, *headers: str) -> Bomb:
    """A prediction in the base's own formats."""
    return Bomb(PREDICT, content_type, body, headers)


def _inputs(value: bytes) -> bytes:
    return b'{"inputs":' + value + b"}"


def repeated(item: bytes, size: int = MOST - 64) -> bytes:
    """A JSON list of so many of these items as fit into so many bytes."""
    return b"[" + b",".join([item] * ((size - 2) // (len(item) + 1))) + b"]"


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, channels: int = 1) -> bytes:
    """All pixels are equal, so that a thousand of them are a byte."""
    colour = {1: 0, 3: 2, 4: 6}[channels]
    deflate = zlib.compressobj(9)
    row = bytes(1 + width * channels)
    rows = max(1, MB // len(row))
    pixels = b"".join(deflate.compress(row * min(rows, height - top)) for top in range(0, height, rows))
    pixels += deflate.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def empty_jpeg(width: int, height: int) -> bytes:
    """631 bytes: the headers of an image of this size, and no pixel. A decoder fills them all in."""
    stream = BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "JPEG")
    body = bytearray(stream.getvalue())
    frame = body.index(b"\xff\xc0")
    body[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    scan = body.index(b"\xff\xda")
    return bytes(body[: scan + 14]) + b"\xff\xd9"


def encoded(form: str, width: int, height: int, mode: str = "RGB", **options: object) -> bytes:
    """An image of one colour."""
    stream = BytesIO()
    Image.new(mode, (width, height)).save(stream, form, **options)
    return stream.getvalue()


def animation(form: str, frames: int, side: int) -> bytes:
    """So many frames that differ."""
    images = [Image.new("P" if form == "GIF" else "RGB", (side, side), number % 250) for number in range(frames)]
    stream = BytesIO()
    images[0].save(stream, form, save_all=True, append_images=images[1:])
    return stream.getvalue()


def form_of(files: list[bytes]) -> bytes:
    """A form with these files."""
    parts = [b'--x\r\nContent-Disposition: form-data; name="f"; filename="f"\r\n\r\n' + file for file in files]
    return b"\r\n".join(parts) + b"\r\n--x--\r\n"


FORM = "multipart/form-data; boundary=x"


def npy(shape: str, data: bytes = b"", dtype: str = "<f4") -> bytes:
    """An array file whose header says this, whatever follows it."""
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data


def npz(members: Mapping[str, bytes]) -> bytes:
    """An archive of array files."""
    stream = BytesIO()
    with ZipFile(stream, "w", ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return stream.getvalue()


def binary(datatype: str, shape: list[int], data: bytes) -> Bomb:
    """A V2 request whose tensor is binary."""
    head = (
        f'{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":{shape},'
        f'"parameters":{{"binary_data_size":{len(data)}}}}}]}}'
    ).encode()
    return Bomb(INFER, "application/octet-stream", head + data, (f"{JSON_LENGTH}: {len(head)}",))


def tensor(data: bytes, shape: str) -> Bomb:
    """A V2 request whose tensor is JSON."""
    return Bomb(
        INFER, JSON, b'{"inputs":[{"name":"x","datatype":"FP32","shape":' + shape.encode() + b',"data":' + data + b"}]}"
    )


JSON_BOMBS: Final[Mapping[str, Callable[[], Bomb]]] = {
    "json: tiny lists": lambda: predict_with(_inputs(repeated(b"[]"))),
    "json: lists of one": lambda: predict_with(_inputs(repeated(b"[0]"))),
    "json: lists below the bound": lambda: predict_with(_inputs(repeated(b"[0]", 4_190_000))),
    "json: tiny objects": lambda: predict_with(_inputs(repeated(b"{}"))),
    "json: tiny texts": lambda: predict_with(_inputs(repeated(b'"a"'))),
    "json: deep": lambda: predict_with(_inputs(b"[" * (MOST - 64))),
    "json: deep and closed": lambda: predict_with(_inputs(b"[" * 1000 + b"]" * 1000)),
    "json: wide": lambda: predict_with(_inputs(repeated(b"0"))),
    "json: wide rows": lambda: predict_with(_inputs(b"[" + repeated(b"255", 15 * MB) + b"]")),
    "json: one huge number": lambda: predict_with(_inputs(b"[[" + b"9" * (MOST - 64) + b"]]")),
    "json: huge numbers": lambda: predict_with(_inputs(b"[" + repeated(b"1e308", 15 * MB) + b"]")),
    "json: long decimals": lambda: predict_with(_inputs(b"[" + repeated(b"0." + b"1" * 700, 15 * MB) + b"]")),
    "json: one huge text": lambda: predict_with(_inputs(b'"' + b"a" * (MOST - 64) + b'"')),
    "json: escapes": lambda: predict_with(_inputs(b'"' + b"\\u00e9" * (2_700_000) + b'"')),
    "json: many keys": lambda: predict_with(b"{" + b",".join(b'"%d":0' % key for key in range(1_300_000)) + b"}"),
    "v2 json: wide": lambda: tensor(repeated(b"0", MOST - 256), "[1000000,1,2,4]"),
    "v2 json: floats": lambda: tensor(repeated(b"0.123456", MOST - 256), "[233000,1,2,4]"),
    "v2 json: tiny lists": lambda: tensor(repeated(b"[]", MOST - 256), "[1,1,2,4]"),
    "base64: spaces": lambda: predict_with(_inputs(b'{"b64":"' + b"A " * (MOST // 2 - 64) + b'"}')),
    "base64: a bomb": lambda: predict_with(_inputs(b'{"b64":"' + base64.b64encode(png(7000, 7000, 4)) + b'"}')),
    "base64: a list of bombs": lambda: predict_with(
        _inputs(repeated(b'{"b64":"' + base64.b64encode(png(1800, 1800, 4)) + b'"}', 300_000))
    ),
}
IMAGE_BOMBS: Final[Mapping[str, Callable[[], Bomb]]] = {
    "png: 7000 x 7000": lambda: predict_with(png(7000, 7000), "image/png"),
    "png: RGBA": lambda: predict_with(png(7000, 7000, 4), "image/png"),
    "png: 50,000,000 x 1": lambda: predict_with(png(50_000_000, 1), "image/png"),
    "png: 1 x 16,000": lambda: predict_with(png(1, 16_000), "image/png"),
    "png: 2 MB of RGBA in a form": lambda: predict_with(form_of([png(1000, 1000, 4)] * 49), FORM),
    "png: gigapixels": lambda: predict_with(png(60_000, 60_000)[:100_000], "image/png"),
    "jpeg: 631 bytes": lambda: predict_with(empty_jpeg(7000, 7000), "image/jpeg"),
    "jpeg: scans": lambda: predict_with(_scans(2000, 120), "image/jpeg"),
    "gif: frames": lambda: predict_with(animation("GIF", 500, 300), "image/gif"),
    "gif: large": lambda: predict_with(encoded("GIF", 7000, 7000, "P"), "image/gif"),
    "tiff: deflate": lambda: predict_with(encoded("TIFF", 7000, 7000, compression="tiff_adobe_deflate"), "image/tiff"),
    "bmp: large": lambda: predict_with(encoded("BMP", 2300, 2300), "image/bmp"),
    "form: tiny parts": lambda: predict_with(form_of([b""] * 250_000), FORM),
    "form: no boundary": lambda: predict_with(b"-" * (MOST - 64), FORM),
}
OPTIONAL_BOMBS: Final[Mapping[str, Callable[[], Bomb]]] = {
    "webp: large": lambda: predict_with(encoded("WEBP", 7000, 7000, lossless=True, method=0, quality=0), "image/webp"),
    "avif: large": lambda: predict_with(encoded("AVIF", 4000, 4000, speed=10), "image/avif"),
}
"""By the library that Pillow may have been built without."""
BINARY_BOMBS: Final[Mapping[str, Callable[[], Bomb]]] = {
    "v2: more than announced": lambda: binary("FP32", [400_000, 1, 2, 4], bytes(MOST - 512)),
    "v2: float32": lambda: binary("FP32", [500_000, 1, 2, 4], bytes(16_000_000)),
    "v2: float16": lambda: binary("FP16", [1_000_000, 1, 2, 4], bytes(16_000_000)),
    "v2: not a number": lambda: binary("FP32", [500_000, 1, 2, 4], b"\xff" * 16_000_000),
    "v2: a header of 16 MB": lambda: Bomb(INFER, JSON, _inputs(repeated(b"{}")), (f"{JSON_LENGTH}: {MOST - 200}",)),
    "gzip: 16 GB": lambda: predict_with(_gigabytes(), JSON, "content-encoding: gzip"),
    "gzip: 16 MB of lists": lambda: predict_with(
        gzip.compress(_inputs(repeated(b"[]"))), JSON, "content-encoding: gzip"
    ),
    "deflate: a bomb": lambda: predict_with(zlib.compress(bytes(500 * MB)), JSON, "content-encoding: deflate"),
    "gzip: members": lambda: predict_with(gzip.compress(b"") * 500_000, JSON, "content-encoding: gzip"),
}
BOMBS: Final = {
    **JSON_BOMBS,
    **IMAGE_BOMBS,
    **{name: make for name, make in OPTIONAL_BOMBS.items() if features.check(name.partition(":")[0])},
    **BINARY_BOMBS,
}


def _gigabytes() -> bytes:
    return gzip.compress(bytes(1024 * MB), 1)


def _scans(side: int, count: int) -> bytes:
    body = encoded("JPEG", side, side, "L", progressive=True)
    last = body[body.rindex(b"\xff\xda") : -2]
    return body[:-2] + last * count + body[-2:]


ARRAY_BOMBS: Final[Mapping[str, Callable[[], bytes]]] = {
    "npy: a header that lies": lambda: npy("(1000000000000, 1000)"),
    "npy: thousands of axes": lambda: npy("(" + "1," * 4000 + ")", bytes(4)),
    "npy: a negative axis": lambda: npy("(-1, -4)", bytes(16)),
    "npy: a number of 4,000 digits": lambda: npy("(" + "9" * 4000 + ",)"),
    "npy: parentheses": lambda: npy("(" * 5000),
    "npy: objects": lambda: npy("(1,)", bytes(8), "|O"),
    "npz: zeros": lambda: npz({f"x{number}": npy("(16777216,)", bytes(2**26)) for number in range(3)}),
    "npz: 5,000 members": lambda: npz({str(number): b"" for number in range(5_000)}),
}
"""For a model that takes arrays: `.npy` and `.npz`."""


def _varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])


def field(number: int, content: bytes) -> bytes:
    """One field of a message of protobuf that has a length."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _asking(content: bytes) -> bytes:
    return field(1, b"rules") + content


def _typed(contents: bytes) -> bytes:
    return _asking(field(5, field(1, b"x") + field(2, b"FP32") + field(5, contents)))


GRPC_HEAVY: Final[Mapping[str, Callable[[], bytes]]] = {
    "texts": lambda: _typed(field(8, b"") * (MOST // 2 - 64)),
    "single numbers": lambda: _typed((b"\x35" + bytes(4)) * (MOST // 5 - 64)),
    "varints": lambda: _typed(field(3, bytes(MOST - 64))),
    "truths": lambda: _typed(field(1, b"\1" * (MOST - 64))),
}
"""Messages of ModelInfer that take long to parse."""
GRPC_TOO_MANY: Final[Mapping[str, Callable[[], bytes]]] = {
    "tensors": lambda: _asking(field(5, b"") * (MOST // 2 - 64)),
    "parameters": lambda: _asking(b"".join(field(4, field(1, b"%08d" % number)) for number in range(500_000))),
    "outputs": lambda: _asking(field(6, b"") * (MOST // 2 - 64)),
    "raw tensors": lambda: _asking(field(7, b"") * (MOST // 2 - 64)),
    "unknown fields": lambda: _asking(b"\xf8\x07\x00" * (MOST // 3 - 64)),
    "dimensions": lambda: _asking(field(5, b"\x18\x01" * (MOST // 2 - 64))),
    "parameters of a tensor": lambda: _asking(field(5, field(4, b"") * (MOST // 2 - 64))),
}
"""And those of which nobody makes objects."""
