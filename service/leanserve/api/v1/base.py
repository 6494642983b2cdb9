"""`GET /v1/base`: what the base takes and gives, so that a client (the page at `/` is one) knows what to offer."""

from __future__ import annotations

import math
from typing import Literal

from leanserve.contracts import Base, Json, ModelSpec, TensorSpec
from leanserve.texts import KINDS

Kind = Literal["image", "audio", "text", "arrays"]
_MOST_ELEMENTS = 2048
"""Of an example that is told."""


def base_document(base: Base) -> Json:
    """Name, kind of input, media types, tensors, labels and caveats; a row as an example where only JSON says one."""
    spec, kind = base.spec, input_kind(base.codec.media_types)
    return {
        "name": base.name,
        "caveats": base.caveats,
        "kind": kind,
        "media_types": base.codec.media_types,
        "inputs": [_tensor(item) for item in spec.inputs],
        "outputs": [_tensor(item) | {"meaning": item.meaning} for item in spec.outputs],
        "labels": spec.labels,
        "example": _example(spec) if kind == "arrays" else None,
    }


def input_kind(media_types: tuple[str, ...]) -> Kind:
    """What a person would send, by the content types that a codec takes."""
    families = {media_type.partition("/")[0] for media_type in media_types}
    if "image" in families:
        return "image"
    if "audio" in families:
        return "audio"
    return "text" if "text/plain" in media_types else "arrays"


def _tensor(item: TensorSpec) -> dict[str, Json]:
    return {"name": item.name, "dtype": item.dtype, "shape": item.shape}


def _example(spec: ModelSpec) -> Json:
    """A body for `/v1/predict`; `None` where nobody would like to read it."""
    row = [array[0] for array in spec.example(1)]
    if sum(math.prod(array.shape) for array in row) > _MOST_ELEMENTS:
        return None
    values = [(array if array.dtype.kind in KINDS else array.round(3)).tolist() for array in row]
    if len(values) == 1:
        return {"inputs": values[0]}
    return {"inputs": dict(zip((item.name for item in spec.inputs), values, strict=True))}
