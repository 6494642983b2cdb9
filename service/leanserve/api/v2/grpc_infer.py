"""Infer over gRPC: request message -> checked arrays, and outputs -> reply message.

A request is restated as the JSON header and the binary tensors of the REST protocol, so that one set of rules reads
both and refuses both with the same words. Tensors in `raw_input_contents` stay views (`grpc_wire.py`); those in typed
`contents` are converted element by element, which is as slow as JSON. The reply uses the form of the request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import orjson

from leanserve.api.v2.grpc_messages import message
from leanserve.api.v2.grpc_wire import ContentsForm, InferMessage, field_head
from leanserve.codecs.infer_plan import BinaryTensor, InferOptions, KeptTensor, plan_json
from leanserve.codecs.joining import joined
from leanserve.codecs.open_inference import InferRequest
from leanserve.codecs.tensors import DATATYPES, Buffer, Datatype, ports, to_binary
from leanserve.contracts import Array, Arrays, Json, ModelSpec
from leanserve.errors import BadInput
from leanserve.texts import LENGTH

_PIECE = 2**16
"""Numbers that are converted at once."""
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Which field holds a datatype's elements; FP16 and BF16 have none."""
_RAW_OUTPUT = 6
"""Number of the field `raw_output_contents`."""


class GrpcInferDecoder:
    """Decodes the infer requests of one model. Thread-safe."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._inputs = ports(spec.inputs)
        self._outputs = ports(spec.outputs)

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process."""
        return type(self), (self._spec,)

    def decode(self, sent: InferMessage) -> InferRequest:
        """Check and decode a `ModelInferRequest`. Raises `BadInput`."""
        request, chunks = sent.head, _chunks(sent)
        document = {
            "id": request.id,
            "parameters": _parameters(request.parameters),
            "inputs": [_input(tensor, chunk) for tensor, chunk in zip(request.inputs, chunks, strict=True)],
            "outputs": [
                {"name": output.name, "parameters": _parameters(output.parameters)} for output in request.outputs
            ],
        }
        plan = plan_json(orjson.dumps(document), self._inputs, self._outputs)
        by_name = {tensor.name: chunk for tensor, chunk in zip(request.inputs, chunks, strict=True)}
        inputs = tuple(_read(tensor, by_name) for tensor in plan.inputs)
        return InferRequest(inputs, plan.rows, plan.options)


def _read(tensor: Array | BinaryTensor | KeptTensor, sent: Mapping[str, Buffer]) -> Array:
    if isinstance(tensor, KeptTensor):
        return tensor.read(b"", 0)
    assert isinstance(tensor, BinaryTensor)  # no input was restated as JSON data
    return tensor.read(sent[tensor.port.name], -tensor.start)


def _chunks(sent: InferMessage) -> Sequence[Buffer]:
    """The bytes of every input, in the order of the request."""
    request, raw = sent
    if not raw:
        return [_pack(tensor) for tensor in request.inputs]
    if len(raw) != len(request.inputs):
        raise BadInput(f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs; send one for each")
    for tensor in request.inputs:
        if tensor.HasField("contents"):
            raise BadInput(f"input {tensor.name!r} has 'contents', but the request has raw_input_contents; send one")
    return raw


def _pack(tensor: Any) -> bytes:
    """The elements of typed `contents` as a binary tensor."""
    datatype = DATATYPES.get(tensor.datatype)
    if datatype is None:
        return b""  # refused with the others that the model does not take
    field = _CONTENTS.get(datatype.name)
    if field is None:
        raise BadInput(f"input {tensor.name!r}: {datatype.name} has no typed contents; use raw_input_contents")
    values = getattr(tensor.contents, field)
    count = prod(tensor.shape)
    if len(values) != count:
        takes = f"its shape {list(tensor.shape)} takes {count}"
        raise BadInput(f"input {tensor.name!r} has {len(values)} elements in {field}, {takes}")
    if datatype.name == "BYTES":
        return b"".join(chain.from_iterable((LENGTH.pack(len(item)), item) for item in values))
    try:
        return bytes(to_binary(datatype, _array(datatype, values)))
    except OverflowError:
        raise BadInput(f"input {tensor.name!r}: a number is out of the range of {datatype.name}") from None


def _array(datatype: Datatype, values: Any) -> Array:
    # In pieces: Python's lock is held for each of them.
    pieces = (values[start : start + _PIECE] for start in range(0, len(values), _PIECE))
    return np.concatenate([np.empty(0, datatype.wire), *(np.array(piece, datatype.wire) for piece in pieces)])


def _input(tensor: Any, chunk: Buffer) -> Json:
    shape = list(tensor.shape)
    datatype = DATATYPES.get(tensor.datatype)
    if datatype is not None:
        least = prod(shape) * datatype.least_size
        if len(chunk) < least or (len(chunk) > least and datatype.name != "BYTES"):
            takes = f"{datatype.name} of shape {shape} takes {least}"
            raise BadInput(f"input {tensor.name!r} has {len(chunk)} bytes in raw_input_contents, {takes}")
    parameters = _parameters(tensor.parameters) | {"binary_data_size": len(chunk)}
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": shape, "parameters": parameters}


def _parameters(sent: Any) -> dict[str, Json]:
    chosen = {name: (value, value.WhichOneof("parameter_choice")) for name, value in sent.items()}
    return {name: getattr(value, choice) for name, (value, choice) in chosen.items() if choice}


def encode(
    options: InferOptions, outputs: Arrays, form: ContentsForm, names: tuple[str, str], how: Mapping[str, float]
) -> bytes:
    """The serialized `ModelInferResponse` with the outputs that were asked for; `names` are those of model and version.

    Outputs that have no typed contents (FP16, BF16) make the whole reply raw, as the protocol wants one form for all.
    """
    reply = message("ModelInferResponse")(model_name=names[0], model_version=names[1], id=options.id)
    for name, value in how.items():
        setattr(reply.parameters[name], "int64_param" if isinstance(value, int) else "double_param", value)
    typed = form == "typed" and all(wanted.port.datatypes[0].name in _CONTENTS for wanted in options.outputs)
    raw: list[bytes | memoryview] = []
    for wanted in options.outputs:
        datatype, array = wanted.port.datatypes[0], outputs[wanted.port.position]
        output = reply.outputs.add(name=wanted.port.name, datatype=datatype.name, shape=array.shape)
        if typed:
            contents, flat = getattr(output.contents, _CONTENTS[datatype.name]), array.ravel()
            for start in range(0, flat.size, _PIECE):
                contents.extend(_elements(datatype, flat[start : start + _PIECE]))
        else:
            chunk = to_binary(datatype, array)
            raw += (field_head(_RAW_OUTPUT, chunk.nbytes), chunk)
    return joined([reply.SerializeToString(), *raw])  # fields may come in any order


def _elements(datatype: Datatype, array: Array) -> list[Any]:
    values: list[Any] = array.tolist()
    return [text.encode() for text in values] if datatype.name == "BYTES" else values
