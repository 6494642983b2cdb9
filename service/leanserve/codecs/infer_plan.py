"""Reads the JSON part of an inference request into a plan: where each tensor lies in the body and what is wanted back.

A client that sends the same kind of request again sends the same JSON bytes again; only the tensors behind them differ.
So everything that depends on the JSON alone is checked and worked out here, once, and kept in a `InferPlan` that can be
applied to any number of bodies. Keys this server does not know are left alone, as the protocol asks (clients add
their own); options it knows but does not offer are refused, never ignored. `null` counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Literal, NamedTuple

import numpy as np

from leanserve.codecs.json_body import json_object
from leanserve.codecs.tensors import MOST_TEXTS, Buffer, Datatype, Port, Shape, clip, from_binary, from_json
from leanserve.contracts import Array, Arrays, Json, SequenceStep
from leanserve.errors import BadInput, BodyTooLarge

POSTPROCESS = "postprocess"
"""The request parameter that asks for the answers of post-processing instead of the model's outputs."""
_MAX_INT = 2**63 - 1
LONGEST_ID = 128
"""Characters of the id of a sequence."""


class WantedOutput(NamedTuple):
    """An output to send back, and whether as JSON numbers or as bytes behind the JSON."""

    port: Port
    form: Literal["json", "binary"]


class InferOptions(NamedTuple):
    """What a request asks for besides its tensors.

    `timeout_us` bounds the time in the queue (microseconds), `priority` is 1 for the most urgent level; `None` is the
    default of either. `parameters` are all request parameters as sent. An empty `id` means that none was sent.
    `sequence` is the place in a sequence of a request that belongs to one.
    """

    id: str
    parameters: Mapping[str, Json]
    timeout_us: int | None
    priority: int | None
    outputs: tuple[WantedOutput, ...]
    sequence: SequenceStep | None = None

    @property
    def is_postprocessed(self) -> bool:
        """Whether the answers of post-processing are asked for."""
        return POSTPROCESS in self.parameters and self.parameters[POSTPROCESS] is True


class KeptTensor(NamedTuple):
    """A state that the server keeps: what the first request of a sequence takes for it is 0."""

    port: Port

    @property
    def shape(self) -> Shape:
        return 1, *self.port.shape[1:]

    def read(self, _body: Buffer, _base: int) -> Array:
        return np.zeros(self.shape, self.port.dtype)


class BinaryTensor(NamedTuple):
    """An input whose `size` bytes start `start` bytes behind the JSON."""

    port: Port
    datatype: Datatype
    shape: Shape
    start: int
    size: int

    def read(self, body: Buffer, base: int) -> Array:
        return from_binary(self.datatype, body, base + self.start, self.port, self.shape, self.size)


class InferPlan(NamedTuple):
    """A checked request but for its bytes: the inputs in the order of the spec (an array where the data came in the
    JSON), their rows, what is wanted, and how many bytes follow the JSON.
    """

    options: InferOptions
    inputs: tuple[Array | BinaryTensor | KeptTensor, ...]
    rows: int
    size: int

    @property
    def reusable(self) -> bool:
        """Whether nothing in it belongs to one request alone, neither data nor an id."""
        return not self.options.id and not any(isinstance(tensor, np.ndarray) for tensor in self.inputs)

    def read(self, body: Buffer, base: int) -> Arrays:
        """The inputs; the binary ones lie in `body` from `base` on. Raises `BadInput` for impossible BOOL or BYTES.

        The caller has made sure of `size` (`check_size`).
        """
        return tuple([item if isinstance(item, np.ndarray) else item.read(body, base) for item in self.inputs])

    def check_size(self, size: int, form: Literal["header", "no header"]) -> None:
        """Raise `BadInput` unless exactly the bytes the inputs announce follow the JSON."""
        binary = [tensor for tensor in self.inputs if isinstance(tensor, BinaryTensor)]
        if form == "no header" and binary:
            raise BadInput(
                f"input {binary[0].port.name!r} has 'binary_data_size', but the request has no header "
                "Inference-Header-Content-Length to say where the binary data starts"
            )
        for tensor in sorted(binary, key=lambda tensor: tensor.start):
            if tensor.start + tensor.size > size:
                raise BadInput(
                    f"input {tensor.port.name!r} announces {tensor.size} bytes, "
                    f"only {max(0, size - tensor.start)} are left in the body"
                )
        if size > self.size:
            raise BadInput(f"{size - self.size} bytes are left over behind the last input's binary data")


def plan_json(text: Buffer, inputs: Mapping[str, Port], outputs: Mapping[str, Port]) -> InferPlan:
    """The plan of a request from its JSON part. Raises `BadInput`, or `BodyTooLarge` for too many texts."""
    document = json_object(text)
    parameters = _parameters(document, "the request")
    asked = _sequence(parameters, inputs)
    tensors, size = _inputs(document.get("inputs"), inputs, asked)
    options = _options(document, parameters, _step(asked, tensors), _left_out(asked, inputs, outputs))
    rows = tensors[0].shape[0]
    if any(tensor.shape[0] != rows for tensor in tensors):
        each = ", ".join(f"{name}: {tensor.shape[0]}" for name, tensor in zip(inputs, tensors, strict=True))
        raise BadInput(f"the inputs differ in their number of rows, which is the first axis ({each})")
    if asked is not None and rows != 1:
        raise BadInput(f"a request of a sequence has one row, not {rows}")
    return InferPlan(options, tensors, rows, size)


def plan_raw(size: int, inputs: Mapping[str, Port], outputs: Mapping[str, Port]) -> InferPlan:
    """The plan of a raw request: the `size` bytes of the body are rows of the only input, all outputs go back binary.

    Raises `BadInput` where the number of rows cannot be told from the size: several inputs, varying axes, BYTES.
    """
    if len(inputs) != 1:
        raise BadInput(
            f"a raw request (Inference-Header-Content-Length: 0) fits one input, the model has {len(inputs)}"
        )
    (port,) = inputs.values()
    datatype = port.datatypes[0]
    row = port.shape[1:]
    if datatype.name == "BYTES" or -1 in row:
        raise BadInput(f"input {port.name!r} cannot be sent raw: its size does not tell its shape; send a JSON header")
    row_size = prod(row) * datatype.wire.itemsize
    rows, rest = divmod(size, row_size)
    if rest or not rows:
        raise BadInput(f"input {port.name!r}: {size} raw bytes are not a whole number of rows of {row_size} bytes")
    wanted = tuple(WantedOutput(output, "binary") for output in outputs.values())
    options = InferOptions("", {}, None, None, wanted)
    return InferPlan(options, (BinaryTensor(port, datatype, (rows, *row), 0, size),), rows, size)


def _sequence(parameters: Mapping[str, Json], inputs: Mapping[str, Port]) -> SequenceStep | None:
    """Where in a sequence the request says that it is; an id of 0 or nothing means in none."""
    start = _boolean(parameters, "sequence_start", "the request") or False
    end = _boolean(parameters, "sequence_end", "the request") or False
    key = parameters.get("sequence_id")
    if key is None or (type(key) in {int, str} and not key):
        if start or end:
            raise BadInput("'sequence_start' and 'sequence_end' belong to a 'sequence_id', which is missing")
        return None
    if type(key) not in {int, str} or (isinstance(key, int) and not 0 < key < 2**64) or len(str(key)) > LONGEST_ID:
        raise BadInput(
            f"parameter 'sequence_id' must be an integer from 1 to 2^64 - 1 or a string of at most {LONGEST_ID} "
            f"characters, not {clip(key)}"
        )
    if all(port.next_from is None for port in inputs.values()):
        raise BadInput("parameter 'sequence_id': this model has no state to keep (base.state); leave it out")
    return SequenceStep(key, start, end, frozenset())


def _step(asked: SequenceStep | None, tensors: Sequence[Array | BinaryTensor | KeptTensor]) -> SequenceStep | None:
    """With the positions of the states that the server keeps."""
    if asked is None:
        return None
    return asked._replace(keeps=frozenset(item.port.position for item in tensors if isinstance(item, KeptTensor)))


def _left_out(
    asked: SequenceStep | None, inputs: Mapping[str, Port], outputs: Mapping[str, Port]
) -> tuple[Mapping[str, Port], Mapping[str, Port]]:
    """The outputs that may be asked for, and those that are sent where none is: in a sequence all that are no state."""
    if asked is None:
        return outputs, outputs
    states = {port.next_from for port in inputs.values()}
    return outputs, {name: port for name, port in outputs.items() if name not in states}


def _options(
    document: Mapping[str, Json],
    parameters: Mapping[str, Json],
    sequence: SequenceStep | None,
    outputs: tuple[Mapping[str, Port], Mapping[str, Port]],
) -> InferOptions:
    identity = document.get("id")
    if identity is not None and type(identity) is not str:
        raise BadInput(f"'id' must be a string, not {clip(identity)}")
    every_output = _boolean(parameters, "binary_data_output", "the request") or False
    if _boolean(parameters, POSTPROCESS, "the request") and document.get("outputs"):
        raise BadInput(
            f"parameter {POSTPROCESS!r} asks for other tensors than the model's outputs; leave 'outputs' out"
        )
    return InferOptions(
        identity or "",
        parameters,
        _natural(parameters, "timeout", "the request") or None,
        _natural(parameters, "priority", "the request") or None,
        _wanted(document.get("outputs"), *outputs, "binary" if every_output else "json"),
        sequence,
    )


def _wanted(
    listed: Json, outputs: Mapping[str, Port], usual: Mapping[str, Port], default: Literal["json", "binary"]
) -> tuple[WantedOutput, ...]:
    if listed is None or listed == []:
        return tuple(WantedOutput(port, default) for port in usual.values())
    if not isinstance(listed, list):
        raise BadInput(f"'outputs' must be an array of objects, not {clip(listed)}")
    wanted: dict[str, WantedOutput] = {}
    for item in listed:
        port = _named(item, outputs, "output")
        if port.name in wanted:
            raise BadInput(f"output {port.name!r} is asked for twice")
        parameters = _parameters(item, f"output {port.name!r}")
        if parameters.get("classification"):
            raise BadInput(f"output {port.name!r}: 'classification' is not offered; ask for the scores and rank them")
        binary = _boolean(parameters, "binary_data", f"output {port.name!r}")
        wanted[port.name] = WantedOutput(port, default if binary is None else "binary" if binary else "json")
    return tuple(wanted.values())


def _inputs(
    listed: Json, inputs: Mapping[str, Port], asked: SequenceStep | None
) -> tuple[tuple[Array | BinaryTensor | KeptTensor, ...], int]:
    """The inputs in the order of the spec, and the bytes that they take behind the JSON."""
    if not isinstance(listed, list):
        raise BadInput(f"'inputs' must be an array of tensors, not {clip(listed)}")
    found: dict[str, Array | BinaryTensor | KeptTensor] = {}
    size = 0
    for item in listed:
        port = _named(item, inputs, "input")
        if port.name in found:
            raise BadInput(f"input {port.name!r} is given twice")
        if asked is not None and not asked.start and port.next_from is not None:
            raise BadInput(
                f"input {port.name!r} is the state, which the server keeps; only a first request may send it"
            )
        tensor = found[port.name] = _tensor(item, port, size)
        size += tensor.size if isinstance(tensor, BinaryTensor) else 0
    if asked is not None:
        states = {name: port for name, port in inputs.items() if port.next_from is not None and name not in found}
        found |= {name: KeptTensor(port) for name, port in states.items()}
    missing = [name for name in inputs if name not in found]
    if missing:
        raise BadInput(f"input {missing[0]!r} is missing; the model takes {', '.join(inputs)}")
    return tuple(found[name] for name in inputs), size


def _tensor(item: Mapping[str, Json], port: Port, start: int) -> Array | BinaryTensor:
    where = f"input {port.name!r}"
    datatype = port.datatype(item.get("datatype"))
    shape = port.check_shape(item.get("shape"))
    data = item.get("data")
    size = _natural(_parameters(item, where), "binary_data_size", where)
    if size is None:
        if data is None:
            raise BadInput(f"{where} has neither 'data' nor the parameter 'binary_data_size'")
        _bound_texts(datatype, shape, where)
        return from_json(datatype, data, port, shape)
    if data is not None:
        raise BadInput(f"{where} has both 'data' and the parameter 'binary_data_size'; send one of them")
    least = prod(shape) * datatype.least_size
    if size < least or (size > least and datatype.name != "BYTES"):
        raise BadInput(f"{where}: 'binary_data_size' is {size}, {datatype.name} of shape {list(shape)} takes {least}")
    _bound_texts(datatype, shape, where)
    return BinaryTensor(port, datatype, shape, start, size)


def _bound_texts(datatype: Datatype, shape: Shape, where: str) -> None:
    if datatype.name == "BYTES" and prod(shape) > MOST_TEXTS:
        raise BodyTooLarge(f"{where} has {prod(shape)} texts; at most {MOST_TEXTS} are taken")


def _named(item: Json, known: Mapping[str, Port], kind: Literal["input", "output"]) -> Port:
    name = item.get("name") if isinstance(item, dict) else None
    if not isinstance(name, str):
        raise BadInput(f"each {kind} must be an object with a 'name', not {clip(item)}")
    if name not in known:
        raise BadInput(f"unknown {kind} {clip(name)}; the model has {', '.join(known)}")
    return known[name]


def _parameters(item: Mapping[str, Json], where: str) -> dict[str, Json]:
    parameters = item.get("parameters")
    if parameters is not None and type(parameters) is not dict:
        raise BadInput(f"{where}: 'parameters' must be an object, not {clip(parameters)}")
    if parameters and "shared_memory_region" in parameters:
        raise BadInput(f"{where}: shared memory is not offered; send the tensor as binary data")
    return parameters or {}


def _natural(parameters: Mapping[str, Json], key: str, where: str) -> int | None:
    value = parameters.get(key)
    if value is not None and (type(value) is not int or not 0 <= value <= _MAX_INT):
        raise BadInput(f"{where}: parameter {key!r} must be an integer from 0 to 2^63 - 1, not {clip(value)}")
    return value


def _boolean(parameters: Mapping[str, Json], key: str, where: str) -> bool | None:
    value = parameters.get(key)
    if value is not None and type(value) is not bool:
        raise BadInput(f"{where}: parameter {key!r} must be true or false, not {clip(value)}")
    return value
