"""Files of images and sounds inside another format: the parts of a form, and base64 in JSON.

Forms are `multipart/form-data` as browsers, `curl -F` and HTTP libraries send them; every part is one file, whatever
its field is called. In JSON a file is `{"b64": "..."}`, or a `data:` URL in that place or alone.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator

from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from leanserve.codecs.image_files import EncodedImage
from leanserve.contracts import Json
from leanserve.errors import BadInput, BodyTooLarge

FORM = "multipart/form-data"
_SPACE = b" \t\r\n\v\f"
_PIECE = 2**17
"""Bytes that are searched at once: Python's lock is held for each search."""
MAX_HEADERS, MAX_HEADER_BYTES = 16, 4096
"""Of one part; browsers send two or three headers of some 100 bytes."""


def files_of_form(content_type: str, body: bytes, max_parts: int) -> list[EncodedImage]:
    """The files in a form, at least one.

    Raises:
        BadInput: the form is damaged, cut short or empty. BodyTooLarge: more than `max_parts` parts.
    """
    boundary = parse_options_header(content_type)[1].get("boundary")
    if not boundary:
        raise BadInput(f"content type {FORM} needs the parameter boundary, which separates the parts")
    # Each of them costs more than its bytes: they are counted before any is made.
    if _count(b"\r\n--" + boundary.encode("latin-1", "replace"), body) > max_parts + 1:
        raise _too_many(max_parts)
    try:
        files = list(_files(boundary, body, max_parts))
    except MultipartError as error:
        raise BadInput(f"the form cannot be read: {error}") from error
    if not files:
        raise BadInput("the form has no part; send each file as one")
    return files


def _files(boundary: str, body: bytes, max_parts: int) -> Iterator[EncodedImage]:
    parser = PushMultipartParser(
        boundary,
        max_header_size=MAX_HEADER_BYTES,
        max_header_count=MAX_HEADERS,
        header_charset="latin-1",  # takes any byte
    )
    number = 0
    with parser:
        for start in range(0, len(body), _PIECE):
            for event in parser.parse(body[start : start + _PIECE]):
                if isinstance(event, MultipartSegment):
                    if number == max_parts:
                        raise _too_many(max_parts)
                    part, content = event, list[bytes]()
                elif event is None:
                    yield EncodedImage(part.content_type or "", b"".join(content), _place(part, number))
                    number += 1
                else:
                    content.append(event)


def _too_many(max_parts: int) -> BodyTooLarge:
    return BodyTooLarge(f"the form has more parts than the {max_parts} that one request may have")


def _place(part: MultipartSegment, number: int) -> str:
    label = (part.filename or part.name or "").encode("latin-1", "replace").decode("utf-8", "replace")
    return f"part {number} of the form" + (f" ({label[:60]})" if label else "")


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
