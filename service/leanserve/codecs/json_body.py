"""A request's JSON object, read in one place: every front and codec refuses the same faults with the same words."""

from __future__ import annotations

import orjson

from leanserve.codecs.json_weight import require_few_lists
from leanserve.codecs.tensors import Buffer, clip
from leanserve.contracts import Json
from leanserve.errors import BadInput


def json_object(body: Buffer, holds: str = "") -> dict[str, Json]:
    """The object in a body; of a key that is there twice the last value counts. `holds` tells what should be in it.

    Raises:
        BadInput: it is not valid JSON, or no object.
        BodyTooLarge: it holds too many lists.
    """
    require_few_lists(body)
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadInput(f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"the body must be a JSON object{holds and ' '}{holds}, not {clip(content)}")
    return content


def inputs_of(body: Buffer) -> Json:
    """What stands under `inputs`, the only key that a prediction in JSON has. Raises `BadInput` if it is not there, or
    is not alone."""
    content = json_object(body, 'with the key "inputs"')
    if "inputs" not in content:
        raise BadInput('the body must be a JSON object with the key "inputs"')
    unknown = ", ".join(clip(key) for key in content if key != "inputs")
    if unknown:
        raise BadInput(f'unknown key {unknown}: the body takes "inputs" only')
    return content["inputs"]
