"""Files of images and sounds inside another format: the parts of a form, and base64 in JSON.

Forms are `multipart/form-data` as browsers, `curl -F` and HTTP libraries send them; every part is one file, whatever
its field is called. In JSON a file is `{"b64": "..."}`, or a `data:` URL in that place or alone.
"""

from __future__ import annotations

import binascii

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from leanserve.codecs.image_files import EncodedImage
from leanserve.contracts import Json
from leanserve.errors import BadInput, BodyTooLarge

FORM = "multipart/form-data"
_SPACE = b" \t\r\n\v\f"
_PIECE = 2**20
"""Bytes that are searched at once: Python's lock is held for each search."""
MAX_HEADERS, MAX_HEADER_BYTES = 16, 4096
"""Of one part; browsers send two or three headers of some 100 bytes."""


def files_of_form(content_type: str, body: bytes, max_parts: int) -> list[EncodedImage]:
    """The files in a form, at least one.

    Raises:
        BadInput: the form is damaged, cut short or empty. BodyTooLarge: more than `max_parts` parts.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise BadInput(f"content type {FORM} needs the parameter boundary, which separates the parts")
    # Each of them costs more than its bytes: they are counted before any is made.
    if _count(b"\r\n--" + boundary, body) > max_parts + 1:
        raise BodyTooLarge(f"the form has more parts than the {max_parts} that one request may have")
    parts = _Parts(max_parts)
    try:
        parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]
        for start in range(0, len(body), _PIECE):
            parser.write(body[start : start + _PIECE])
    except FormParserError as error:
        raise BadInput(f"the form cannot be read: {error}") from error
    if not parts.ended:
        raise BadInput("the form is cut short: its last boundary is missing")
    if not parts.files:
        raise BadInput("the form has no part; send each file as one")
    return parts.files


def _count(wanted: bytes, body: bytes) -> int:
    return sum(body.count(wanted, start, start + _PIECE + len(wanted) - 1) for start in range(0, len(body), _PIECE))


def holds_file(value: Json) -> bool:
    """Whether a JSON value stands for an encoded file rather than for pixels."""
    return isinstance(value, dict) or (isinstance(value, str) and value.startswith("data:"))


def file_of_json(value: Json, where: str) -> EncodedImage:
    """A value for which `holds_file` is true, decoded. Raises `BadInput` naming the place."""
    if isinstance(value, dict):
        if value.keys() != {"b64"} or not isinstance(value["b64"], str):
            raise BadInput(f'{where}: a file is {{"b64": "its bytes in base64"}}, nothing more and nothing less')
        value = value["b64"]
    media_type, text = "", value
    if value.startswith("data:"):
        header, comma, text = value[5:].partition(",")
        media_type, *parameters = (item.strip().lower() for item in header.split(";"))
        if not comma or "base64" not in parameters:
            raise BadInput(
                f"{where}: a data URL must be data:image/png;base64,... or the same with the type of another file"
            )
    try:
        # Encoders break lines; anything else that is not base64 is a mistake.
        content = binascii.a2b_base64(text.encode("ascii").translate(None, _SPACE), strict_mode=True)
    except ValueError as error:
        raise BadInput(f"{where}: not base64: {error}") from error
    return EncodedImage(media_type, content, where)


class _Parts:
    """Collects the parts while the parser reports them, within bounds."""

    def __init__(self, max_parts: int) -> None:
        self.files: list[EncodedImage] = []
        self.ended = False
        self._max_parts = max_parts
        self._headers: list[tuple[bytes, bytes]] = []
        self._header_bytes = 0
        self._field = self._value = b""
        self._content: list[bytes] = []

    def callbacks(self) -> dict[str, object]:
        """As the parser calls them."""
        names = ("part_begin", "header_field", "header_value", "header_end", "part_data", "part_end", "end")
        return {f"on_{name}": getattr(self, name) for name in names}

    def part_begin(self) -> None:
        if len(self.files) == self._max_parts:
            raise BodyTooLarge(f"the form has more parts than the {self._max_parts} that one request may have")
        self._headers, self._content, self._header_bytes = [], [], 0

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += self._bounded(data[start:end])

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += self._bounded(data[start:end])

    def header_end(self) -> None:
        self._headers.append((self._field.lower(), self._value))
        self._field = self._value = b""

    def part_data(self, data: bytes, start: int, end: int) -> None:
        self._content.append(data[start:end])

    def part_end(self) -> None:
        headers = dict(self._headers)
        told = parse_options_header(headers.get(b"content-disposition"))[1]
        label = (told.get(b"filename") or told.get(b"name") or b"").decode("utf-8", "replace")
        where = f"part {len(self.files)} of the form" + (f" ({label[:60]})" if label else "")
        media_type = parse_options_header(headers.get(b"content-type"))[0].decode("latin-1")
        self.files.append(EncodedImage(media_type, b"".join(self._content), where))

    def end(self) -> None:
        self.ended = True

    def _bounded(self, piece: bytes) -> bytes:
        self._header_bytes += len(piece)
        if self._header_bytes > MAX_HEADER_BYTES or len(self._headers) >= MAX_HEADERS:
            bounds = f"{MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes of them"
            raise BadInput(f"part {len(self.files)} of the form has more than {bounds}")
        return piece
