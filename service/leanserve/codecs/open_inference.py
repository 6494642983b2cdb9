"""The Open Inference Protocol V2, infer call: body -> arrays and arrays -> body, without HTTP.

This is the hot path of the service, so it is plain functions over bytes: the JSON part of a request is read once per
distinct text (`infer_plan`), binary tensors are views of the body, and a reply is joined from its parts in one copy.
Sources: the KServe Open Inference Protocol (inference_rest.md) and Triton's extensions for binary tensor data,
schedule policy (`timeout`, `priority`) and parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pickle import PickleBuffer
from typing import Any, NamedTuple

from leanserve.codecs.infer_plan import InferOptions, InferPlan, WantedOutput, plan_json, plan_raw
from leanserve.codecs.joining import joined
from leanserve.codecs.json_pieces import json_text
from leanserve.codecs.json_weight import json_seconds
from leanserve.codecs.tensors import Buffer, ports, to_binary, to_json
from leanserve.contracts import Array, Arrays, Json, ModelSpec, Weighed
from leanserve.errors import BadInput

JSON_LENGTH_HEADER = "Inference-Header-Content-Length"
_BYTE_S = 0.5e-9
"""Seconds to check and convert a byte of a binary tensor."""
_CACHED_PLANS = 256
_CACHED_BYTES = 4096


class InferRequest(NamedTuple):
    """A checked request. `inputs` follow the spec's fields, with exactly their dtypes; the first axis counts `rows`.

    The arrays may be views of the body: read-only, unaligned, and valid only while the body is left as it is.
    """

    inputs: Arrays
    rows: int
    options: InferOptions


class InferReply(NamedTuple):
    """A reply's body; `json_length` goes into the header `Inference-Header-Content-Length` unless it is `None`."""

    body: bytes
    json_length: int | None


def parse_json_length(header: bytes | str | None) -> int | None:
    """The value of the header `Inference-Header-Content-Length`. Raises `BadInput` unless it is a plain decimal."""
    if header is None:
        return None
    text = header.encode(errors="replace") if isinstance(header, str) else header
    if not text.isdigit() or len(text) > 18:
        raise BadInput(f"header {JSON_LENGTH_HEADER} must be a number of bytes, not {text[:40]!r}")
    return int(text)


class InferDecoder:
    """Decodes the infer requests of one model.

    Keeps the plans of recent JSON headers, at most 256 of at most 4 KiB, and starts afresh when these are used up.
    Headers that carry data or an id do not come again, so they are not kept.
    """

    def __init__(self, spec: ModelSpec) -> None:
        """Raises `StartupError` for a field whose dtype the protocol cannot carry."""
        self._spec = spec
        self._inputs = ports(spec.inputs)
        self._outputs = ports(spec.outputs)
        self._strings = any(port.dtype.kind == "O" for port in self._inputs.values())
        self._plans: dict[bytes, InferPlan] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: without the plans of others' requests."""
        return type(self), (self._spec,)

    def seconds(self, body: Buffer, json_length: int | None = None) -> float:
        """About how long decoding a body takes; of strings, of which each is an object, no time that others could save.

        Raises:
            BodyTooLarge: its JSON holds too many lists.
        """
        size = len(body) if json_length is None else min(json_length, len(body))
        seconds = json_seconds(memoryview(body)[:size]) + (len(body) - size) * _BYTE_S
        return 0.0 if self._strings else seconds

    def decode(self, body: Buffer, json_length: int | None = None) -> InferRequest:
        """Check and decode a body whose first `json_length` bytes are JSON and whose rest is binary tensors.

        `None`: the whole body is JSON. 0: a raw request, the whole body is the single input. Raises `BadInput`.
        """
        if json_length is None:
            plan = plan_json(body, self._inputs, self._outputs)
            plan.check_size(0, "no header")
            json_length = len(body)
        elif json_length == 0:
            plan = plan_raw(len(body), self._inputs, self._outputs)
        else:
            plan = self._plan(body, json_length)
        return InferRequest(plan.read(body, json_length), plan.rows, plan.options)

    def options(self, begun: bytes, json_length: int | None) -> InferOptions | None:
        """What a request asks for, if the bytes that have come say so, in JSON that was read before."""
        plan = self._plans.get(begun[:json_length]) if json_length and json_length <= len(begun) else None
        return None if plan is None else plan.options

    def _plan(self, body: Buffer, json_length: int) -> InferPlan:
        if not 0 < json_length <= len(body):
            raise BadInput(f"header {JSON_LENGTH_HEADER} is {json_length}, the body has {len(body)} bytes")
        header = bytes(body[:json_length])
        plan = self._plans.get(header) if json_length <= _CACHED_BYTES else None
        if plan is None:
            plan = plan_json(header, self._inputs, self._outputs)
            if plan.reusable and json_length <= _CACHED_BYTES:
                if len(self._plans) >= _CACHED_PLANS:
                    self._plans.clear()
                self._plans[header] = plan
        if len(body) - json_length != plan.size:
            plan.check_size(len(body) - json_length, "header")
        return plan


class InferDecoding(NamedTuple):
    """A body of which the first `json_length` bytes are JSON, see `InferDecoder.decode`."""

    decoder: InferDecoder
    body: Buffer
    json_length: int | None

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: the body beside the rest, uncopied."""
        return type(self), (self.decoder, PickleBuffer(self.body), self.json_length)

    def prepare(self) -> Weighed[InferRequest]:
        """Count what is in it."""
        seconds = self.decoder.seconds(self.body, self.json_length)
        return Weighed(seconds, partial(self.decoder.decode, self.body, self.json_length))


def encode_infer(
    options: InferOptions,
    outputs: Arrays,
    model_name: str,
    model_version: str,
    parameters: Mapping[str, Json] | None = None,
) -> InferReply:
    """The reply with the outputs that the request asked for, in its order; `outputs` follow the spec's outputs.

    `parameters` become the reply's parameters. Raises `BadInput` when an output is wanted as JSON but JSON cannot carry
    it: NaN and infinity, FP16 and BF16, BYTES that are not UTF-8.
    """
    chunks: list[bytes | memoryview] = [b""]
    reply: dict[str, Json] = {"model_name": model_name, "model_version": model_version}
    if options.id:
        reply["id"] = options.id
    if parameters:
        reply["parameters"] = dict(parameters)
    reply["outputs"] = [_output(wanted, outputs[wanted.port.position], chunks) for wanted in options.outputs]
    header = json_text(reply, sum([array.size for array in outputs]))
    if len(chunks) == 1:
        return InferReply(header, None)
    chunks[0] = header
    return InferReply(joined(chunks), len(header))


def _output(wanted: WantedOutput, array: Array, chunks: list[bytes | memoryview]) -> dict[str, Json]:
    """The JSON of one output; its bytes, if it is wanted binary, are appended to the chunks."""
    datatype = wanted.port.datatypes[0]
    output: dict[str, Json] = {"name": wanted.port.name, "datatype": datatype.name, "shape": array.shape}
    if wanted.form == "json":
        output["data"] = to_json(datatype, array, wanted.port.name)
    else:
        chunk = to_binary(datatype, array)
        chunks.append(chunk)
        output["parameters"] = {"binary_data_size": chunk.nbytes}
    return output
