"""The infer call of one model as pydantic models: tensors by name, shape and datatype, and an example that works."""

from __future__ import annotations

from math import prod
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from leanserve.api.endpoint import one_of
from leanserve.codecs.tensors import Port, ports
from leanserve.contracts import Json, ModelSpec

_SMALL_ROW = 256
"""Most elements of a row that an example shows."""


class OutputTensor(BaseModel):
    """An output as JSON; as bytes its size is among the parameters instead of data."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any] | None = None
    parameters: dict[str, Any] | None = None


class InferAnswer(BaseModel):
    """The reply to an infer request; its parameters tell how it ran."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, Any]
    outputs: list[OutputTensor]


class IndexQuery(BaseModel):
    """Which variants the index shows."""

    ready: bool = False


class SwapQuery(BaseModel):
    """Parameters of loading and unloading."""

    parameters: dict[str, Any] = Field(default_factory=dict)


def infer_query(spec: ModelSpec) -> type[BaseModel]:
    """The infer request of a model."""
    inputs, outputs = ports(spec.inputs).values(), ports(spec.outputs)
    small = all(port.datatypes[0].json_types and prod(map(abs, port.shape)) <= _SMALL_ROW for port in inputs)
    example: Any = {"example": {"inputs": [_zeros(port) for port in inputs]}} if small else None
    tensors = [_tensor(number, port) for number, port in enumerate(inputs)]
    taken: Any = tensors[0]
    for tensor in tensors[1:]:
        taken |= tensor
    named: dict[str, Any] = {"name": (one_of(outputs), ...), "parameters": (dict[str, Any] | None, None)}
    wanted: Any = create_model("WantedOutput", **named)
    fields: dict[str, Any] = {
        "id": (str, ""),
        "parameters": (dict[str, Any] | None, None),
        "inputs": (list[taken], ...),
        "outputs": (list[wanted] | None, None),
    }
    return create_model("InferQuery", __config__=ConfigDict(json_schema_extra=example), **fields)


def _tensor(number: int, port: Port) -> Any:
    sizes: Any = tuple(Annotated[int, Field(ge=1)] if size < 0 else one_of([size]) for size in port.shape)
    fields: dict[str, Any] = {
        "name": (one_of([port.name]), ...),
        "shape": (tuple[sizes], ...),
        "datatype": (one_of([datatype.name for datatype in port.datatypes]), ...),
        "parameters": (dict[str, Any] | None, None),
        "data": (Annotated[list[Any] | None, Field(description="nested like the shape, or flat")], None),
    }
    return create_model(f"InputTensor{number}", **fields)


def _zeros(port: Port) -> Json:
    """One row of zeros; axes that vary have one element."""
    shape = [abs(size) for size in port.shape]
    zero: Json = {"BOOL": False, "BYTES": ""}.get(port.datatypes[0].name, 0)
    return {"name": port.name, "shape": shape, "datatype": port.datatypes[0].name, "data": [zero] * prod(shape)}
