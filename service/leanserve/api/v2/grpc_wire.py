"""A `ModelInferRequest` as it came over the wire, looked at before it is parsed.

To parse a message is to make an object of each of its fields: sixteen MB of empty tensors are a second of work, in
which no other thread has Python's lock, and a gigabyte. So of a large message the fields are counted first, without a
look into the tensors; raw tensors are not parsed at all, but stay where they came.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from google.protobuf.message import DecodeError

from leanserve.api.v2.grpc_messages import message
from leanserve.codecs.tensors import Buffer
from leanserve.errors import BadInput, BodyTooLarge

SMALL = 2**16
"""Bytes of a message that is parsed where it is: half a millisecond, whatever is in it."""
MOST_FIELDS = 256
"""Tensors, parameters and the like that a message may have, and that each of the tensors of a larger one may."""
ContentsForm = Literal["raw", "typed"]
_NAMES, _INPUTS, _RAW = (1, 2, 3), 5, 7
"""Numbers of the fields of `ModelInferRequest`."""
_CONTENTS, _BYTES_CONTENTS = 5, 8
"""Of the field of a tensor with typed contents, and in these of the field that is no packed list of numbers."""
_LEAST_BYTES = {6: 4, 7: 8}
"""Of a packed number in each field of typed contents; varints have one."""
_RAW_BYTE_S, _ELEMENT_S, _FIELD_S = 0.5e-9, 70e-9, 150e-9
"""Seconds to check and convert a byte of a raw tensor, to convert a typed number, and to make an object of a field."""


class InferMessage(NamedTuple):
    """A parsed message, `raw_input_contents` apart."""

    head: Any
    raw: Sequence[Buffer]


class SeenMessage(NamedTuple):
    """A message with what had to be known of it: who is asked, in which form tensors come, and about how many seconds
    it takes to make arrays of them. `parsed` is there where that was the quickest look."""

    data: bytes
    model_name: str
    model_version: str
    form: ContentsForm
    seconds: float
    parsed: InferMessage | None = None


class _Field(NamedTuple):
    number: int
    tag: int
    """Where the field begins."""
    start: int
    """Where its content does, if it has a length; else as `end`."""
    end: int


def glance(data: bytes) -> SeenMessage:
    """Look at a message; takes less than a millisecond, whatever is in it.

    Raises:
        BadInput: it is none. BodyTooLarge: it has too many tensors, parameters or dimensions.
    """
    if len(data) <= SMALL:
        head = _small(data)
        raw = list(head.raw_input_contents)
        form: ContentsForm = "raw" if raw else "typed"
        seconds = 0.0 if raw else len(data) * _ELEMENT_S
        return SeenMessage(data, head.model_name, head.model_version, form, seconds, InferMessage(head, raw))
    fields = _bounded(data, 0, len(data))
    names = _parsed(b"".join(data[field.tag : field.end] for field in fields if field.number in _NAMES))
    raws = [field for field in fields if field.number == _RAW]
    seconds = sum(field.end - field.start for field in raws) * _RAW_BYTE_S
    seconds += sum(_tensor_seconds(data, field) for field in fields if field.number == _INPUTS)
    return SeenMessage(data, names.model_name, names.model_version, "raw" if raws else "typed", seconds)


def parse(data: bytes) -> InferMessage:
    """All of a message. Raises as `glance`."""
    if len(data) <= SMALL:
        head = _small(data)
        return InferMessage(head, list(head.raw_input_contents))
    view, fields = memoryview(data), _bounded(data, 0, len(data))
    head = _parsed(b"".join([view[field.tag : field.end] for field in fields if field.number != _RAW]))
    return InferMessage(head, [view[field.start : field.end] for field in fields if field.number == _RAW])


def _small(data: bytes) -> Any:
    head = _parsed(data)
    if max(len(head.inputs), len(head.outputs), len(head.raw_input_contents), len(head.parameters)) > MOST_FIELDS:
        raise _too_many()
    return head


def _parsed(data: bytes) -> Any:
    try:
        return message("ModelInferRequest").FromString(data)
    except DecodeError as error:
        raise BadInput(f"this is no ModelInferRequest: {error}") from None


def _tensor_seconds(data: bytes, tensor: _Field) -> float:
    found = [field for field in _bounded(data, tensor.start, tensor.end) if field.number == _CONTENTS]
    return sum(_contents_seconds(data, field) for field in found)


def _contents_seconds(data: bytes, contents: _Field) -> float:
    seconds = 0.0
    for count, field in enumerate(_fields(data, contents.start, contents.end), 1):
        if count > MOST_FIELDS:  # texts, mostly; whatever they are, each has two bytes or more
            return seconds + (contents.end - field.tag) / 2 * _FIELD_S
        if field.number != _BYTES_CONTENTS:
            seconds += (field.end - field.start) / _LEAST_BYTES.get(field.number, 1) * _ELEMENT_S
    return seconds


def _bounded(data: bytes, start: int, end: int) -> list[_Field]:
    found = []
    for field in _fields(data, start, end):
        found.append(field)
        if len(found) > MOST_FIELDS:
            raise _too_many()
    return found


def _fields(data: bytes, start: int, end: int) -> Iterator[_Field]:
    """The fields of a message that lies there (protobuf.dev/programming-guides/encoding)."""
    while start < end:
        key, place = _varint(data, start, end)
        kind = key & 7
        if kind == 2:
            length, content = _varint(data, place, end)
            stop = content + length
        else:
            content = stop = _after_number(data, kind, place, end)
        if stop > end:
            raise _cut_short()
        yield _Field(key >> 3, start, content, stop)
        start = stop


def _after_number(data: bytes, kind: int, place: int, end: int) -> int:
    if kind == 0:
        return _varint(data, place, end)[1]
    if kind not in {1, 5}:
        raise BadInput("this is no ModelInferRequest: it has a field of a kind that is not in use")
    return place + (8 if kind == 1 else 4)


def _varint(data: bytes, place: int, end: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= end:
            raise _cut_short()
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise BadInput("this is no ModelInferRequest: a number in it has too many bytes")


def _too_many() -> BodyTooLarge:
    return BodyTooLarge(f"a message has at most {MOST_FIELDS} tensors, parameters and dimensions")


def _cut_short() -> BadInput:
    return BadInput("this is no ModelInferRequest: it is cut short")


def field_head(number: int, nbytes: int) -> bytes:
    """What stands before the so many bytes of a field: its number (at most 15) with wire type 2, and their length in
    groups of seven bits, the lowest first."""
    head = bytearray((number << 3 | 2,))
    while nbytes > 127:
        head.append(nbytes & 127 | 128)
        nbytes >>= 7
    return bytes((*head, nbytes))
