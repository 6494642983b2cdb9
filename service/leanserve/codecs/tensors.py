"""What one tensor of the Open Inference Protocol looks like, as bytes and as JSON, and how it becomes an array.

Lives apart from the request because every front that speaks the protocol (REST, gRPC) shares these rules: the table of
datatypes, little-endian binary tensors (the binary tensor data extension: BYTES elements are a uint32 length and that
many bytes), and JSON data whose numbers must be exactly what the datatype says. Nothing is converted silently; the one
exception loses nothing: a `float32` field also takes FP16 and BF16, which halves the bytes a client sends.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from math import prod
from reprlib import Repr
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from leanserve.contracts import Array, Json, TensorSpec
from leanserve.errors import BadInput, StartupError
from leanserve.texts import LENGTH, STRING, array_of_texts, numpy_dtype, packed_texts

Buffer: TypeAlias = bytes | bytearray | memoryview
Shape: TypeAlias = tuple[int, ...]

MOST_TEXTS = 2**18
"""Texts in one input: each is an object, and to make so many takes a quarter of a second in which others wait."""
_JSON_NAMES = {
    bool: "a boolean",
    float: "a float",
    int: "an integer",
    str: "a string",
    list: "an array",
    dict: "an object",
}


@dataclass(frozen=True, slots=True)
class Datatype:
    """One datatype of the protocol.

    `wire` is the little-endian dtype of an element in a binary tensor (`object` for BYTES, whose elements vary in
    size); `json_types` are the Python types that a JSON element may have, none where the protocol allows only binary.
    """

    name: str
    wire: np.dtype[Any]
    json_types: frozenset[type] = frozenset()

    @property
    def least_size(self) -> int:
        """The fewest bytes that an element takes in a binary tensor; all of them but BYTES take exactly these."""
        return LENGTH.size if self.name == "BYTES" else self.wire.itemsize


def _table() -> dict[str, Datatype]:
    numbers = {f"{sign}INT{8 * size}": f"<{sign.lower() or 'i'}{size}" for sign in ("", "U") for size in (1, 2, 4, 8)}
    integers = [Datatype(name, np.dtype(wire), frozenset({int})) for name, wire in numbers.items()]
    floats = [Datatype(f"FP{8 * size}", np.dtype(f"<f{size}"), frozenset({float, int})) for size in (4, 8)]
    halves = [Datatype("FP16", np.dtype("<f2")), Datatype("BF16", np.dtype("<u2"))]
    others = [Datatype("BOOL", np.dtype("?"), frozenset({bool})), Datatype("BYTES", np.dtype("O"), frozenset({str}))]
    return {datatype.name: datatype for datatype in (*integers, *floats, *halves, *others)}


DATATYPES = MappingProxyType(_table())
_OF_DTYPE = {d.wire.name: (d,) for d in DATATYPES.values() if d.name not in {"BF16", "BYTES"}} | {
    STRING: (DATATYPES["BYTES"],),
    "float32": (DATATYPES["FP32"], DATATYPES["FP16"], DATATYPES["BF16"]),
    "bfloat16": (DATATYPES["BF16"],),
}


@dataclass(frozen=True, slots=True)
class Port:
    """A field of the spec as the protocol sees it.

    `shape` leads with the axis of rows, and -1 marks an axis that varies; `datatypes` are those the field takes, its
    own first; `dtype` is that of its arrays (float32 where the field is bfloat16, which numpy does not have); `values`
    are the least and the greatest that an element may have, `None` for any. `next_from` names the output that is the
    next value of a state.
    """

    name: str
    position: int
    shape: Shape
    dtype: np.dtype[Any]
    datatypes: tuple[Datatype, ...]
    values: tuple[int, int] | None = None
    next_from: str | None = None

    def datatype(self, name: Json) -> Datatype:
        """The named datatype if this field takes it. Raises `BadInput`."""
        for datatype in self.datatypes:
            if datatype.name == name:
                return datatype
        takes = " or ".join(datatype.name for datatype in self.datatypes)
        raise BadInput(f"input {self.name!r} has datatype {clip(name)}, the model takes {takes}")

    def check_shape(self, shape: Json) -> Shape:
        """The shape as a tuple if it fits: rows, then the axes of the spec, none of them empty. Raises `BadInput`."""
        if type(shape) is list and len(shape) == len(self.shape) and all(map(_axis_fits, shape, self.shape)):
            return tuple(shape)
        takes = list(self.shape)
        raise BadInput(f"input {self.name!r} has shape {clip(shape)}, the model takes {takes} (-1: any size from 1)")

    def check_values(self, array: Array) -> Array:
        """The array, if the model can run with all its elements. Raises `BadInput`."""
        if self.values is not None and not self.values[0] <= array.min() <= array.max() <= self.values[1]:
            found = f"{array.min()} to {array.max()}"
            raise BadInput(f"input {self.name!r} holds {found}; the model takes {self.values[0]} to {self.values[1]}")
        return array


def _axis_fits(size: Json, want: int) -> bool:
    return type(size) is int and size > 0 and want in (-1, size)


def ports(fields: Iterable[TensorSpec]) -> dict[str, Port]:
    """The fields by name, in the order of the spec. Raises `StartupError` for a dtype the protocol cannot carry."""
    return {field.name: _port(field, position) for position, field in enumerate(fields)}


def _port(field: TensorSpec, position: int) -> Port:
    try:
        name = field.dtype if field.dtype in {"bfloat16", STRING} else np.dtype(field.dtype).name
        datatypes = _OF_DTYPE[name]
    except (TypeError, KeyError):
        known = ", ".join(sorted(_OF_DTYPE))
        raise StartupError(
            f"field {field.name!r} has dtype {field.dtype!r}, which no protocol datatype carries; use one of {known}"
        ) from None
    shape = (-1, *(-1 if size is None else size for size in field.shape))
    dtype = numpy_dtype("float32" if name == "bfloat16" else name)
    return Port(field.name, position, shape, dtype, datatypes, field.values, field.next_from)


def clip(value: Json) -> str:
    """A client's value, which may be megabytes long or deeply nested, short enough to be quoted in an error."""
    quote = Repr()
    quote.maxlevel, quote.maxlist, quote.maxstring = 2, 8, 60
    return quote.repr(value)


def from_binary(datatype: Datatype, body: Buffer, offset: int, port: Port, shape: Shape, size: int) -> Array:
    """`size` bytes of `body` from `offset` as an array of the port's dtype. Raises `BadInput`.

    The caller has checked that the bytes are there and, for all but BYTES, that they are just enough. The array is a
    view of the body wherever no conversion is needed: read-only when the body is, not necessarily aligned.
    """
    if datatype.name == "BYTES":
        return _split(body, offset, offset + size, shape, port.name)
    array: Array = np.ndarray(shape, datatype.wire, body, offset)
    if datatype.name == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if datatype.name == "BOOL" and array.view(np.uint8).max() > 1:
        raise BadInput(f"input {port.name!r}: a BOOL element must be the byte 0 or 1")
    return port.check_values(array if array.dtype == port.dtype else array.astype(port.dtype))


def _split(body: Buffer, start: int, end: int, shape: Shape, name: str) -> Array:
    """BYTES elements, in row-major order, as an array of texts."""
    count, texts = prod(shape), []
    for index in range(count):
        if start + LENGTH.size > end:
            raise BadInput(f"input {name!r}: its bytes end before element {index} of the {count} in its shape")
        stop = start + LENGTH.size + LENGTH.unpack_from(body, start)[0]
        if stop > end:
            raise BadInput(f"input {name!r}: element {index} is longer than the {end - start} bytes left for it")
        texts.append(_text(bytes(body[start + LENGTH.size : stop]), index, name))
        start = stop
    if start != end:
        raise BadInput(f"input {name!r}: {end - start} bytes follow the last of its {count} elements")
    return array_of_texts(texts, shape)


def _text(content: bytes, index: int, name: str) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"input {name!r}: element {index} is not UTF-8 ({error.reason})") from None
    refuse_nul(text, f"input {name!r}: element {index}")
    return text


def refuse_nul(text: str, where: str) -> None:
    """Runtimes written in C end a text there, and would answer for another one."""
    if "\0" in text:
        raise BadInput(f"{where} has a NUL character in it")


def from_json(datatype: Datatype, data: Json, port: Port, shape: Shape) -> Array:
    """JSON data, nested like `shape` or flat in row-major order, as an array of the port's dtype. Raises `BadInput`."""
    if not datatype.json_types:
        raise BadInput(f"input {port.name!r}: {datatype.name} can only be sent as binary data, not as JSON")
    flat = _flatten(data, shape, port.name)
    wrong = set(map(type, flat)) - datatype.json_types
    if wrong:
        index, value = next((i, value) for i, value in enumerate(flat) if type(value) in wrong)
        found = _JSON_NAMES.get(type(value), "null")
        raise BadInput(f"input {port.name!r}: element {index} is {found} ({clip(value)}), not {datatype.name}")
    if datatype.name == "BYTES":
        for index, text in enumerate(flat):
            refuse_nul(text, f"input {port.name!r}: element {index}")
        return array_of_texts(flat, shape)
    return _numbers(flat, datatype, port).reshape(shape)


def _flatten(data: Json, shape: Shape, name: str) -> list[Json]:
    if not isinstance(data, list):
        raise BadInput(f"input {name!r}: 'data' must be an array, not {clip(data)}")
    if not data or type(data[0]) is not list:
        if len(data) != prod(shape):
            raise BadInput(f"input {name!r} has {len(data)} elements, its shape {list(shape)} takes {prod(shape)}")
        return data
    level = [data]
    # One axis at a time, so that neither depth nor a ragged level can cost more than the body already did.
    for axis, size in enumerate(shape):
        if set(map(type, level)) != {list} or set(map(len, level)) != {size}:
            raise BadInput(f"input {name!r}: its nested data differs from its shape {list(shape)} at axis {axis}")
        level = list(chain.from_iterable(level))
    return level


def _numbers(flat: list[Json], datatype: Datatype, port: Port) -> Array:
    try:
        with np.errstate(over="ignore"):  # an overflow to infinity is refused below
            array = np.array(flat, dtype=port.dtype)
    except OverflowError:
        raise BadInput(f"input {port.name!r}: a number is out of the range of {datatype.name}") from None
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadInput(f"input {port.name!r}: a number is out of the range of {datatype.name}")
    return port.check_values(array)


def to_binary(datatype: Datatype, array: Array) -> memoryview:
    """The bytes of the array as a binary tensor; a view of the array wherever no conversion is needed."""
    if datatype.name == "BYTES":
        return memoryview(packed_texts(array))
    if datatype.name == "BF16":
        return _round_to_bf16(np.ascontiguousarray(array, dtype=np.float32)).data
    return np.ascontiguousarray(array, dtype=datatype.wire).data


def _round_to_bf16(array: Array) -> Array:
    """The upper halves of float32, rounded to nearest, ties to even; NaN keeps its sign and stays NaN."""
    bits = array.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(array), (bits >> 16) | 0x0040, rounded).astype("<u2")


def to_json(datatype: Datatype, array: Array, name: str) -> Json:
    """The array flat, as orjson takes it with `OPT_SERIALIZE_NUMPY`. Raises `BadInput` where only binary will do."""
    if not datatype.json_types:
        raise BadInput(f"output {name!r}: {datatype.name} {_AS_BINARY}")
    if datatype.name == "BYTES":
        return array.ravel().tolist()
    flat = np.ascontiguousarray(array, dtype=datatype.wire).reshape(-1)
    if flat.dtype.kind == "f" and not np.isfinite(flat).all():
        raise BadInput(f"output {name!r} holds NaN or infinity, which {_AS_BINARY}")
    return flat


_AS_BINARY = "JSON cannot carry; ask for it as binary data (parameter 'binary_data' or 'binary_data_output')"
