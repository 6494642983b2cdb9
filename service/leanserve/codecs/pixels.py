"""Images in JSON: nested lists of pixel values, for clients that have arrays rather than image files.

`{"inputs": pixels}` holds one image or a list of images, which may differ in size. An image is H x W (grey) or
H x W x C with 1 (grey), 3 (RGB) or 4 (RGBA) channels, of whole numbers 0..255. Three levels of lists are one
image with channels if the innermost list is 1, 3 or 4 long, and a list of grey images otherwise.

A file in base64, or a list of such, may stand in place of pixels (`leanserve.codecs.uploads`); the two do not mix.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import TypeAlias

import numpy as np
import orjson

from leanserve.codecs.json_body import inputs_of
from leanserve.codecs.uploads import holds_file
from leanserve.contracts import Array, Json
from leanserve.errors import BadInput

CHANNELS = (1, 3, 4)
Placed: TypeAlias = tuple[Json, str]
"""A JSON value and where in the body it stands."""


def parse_images(body: bytes) -> tuple[list[Placed], bool]:
    """JSON body -> its images, not yet checked, and whether they came as a list. Raises `BadInput`."""
    inputs = inputs_of(body)
    lengths = _lengths(inputs)
    if isinstance(inputs, list) and any(map(holds_file, inputs)):
        _require_files_only(inputs)
    elif not (len(lengths) == 4 or (len(lengths) == 3 and lengths[2] not in CHANNELS)):
        return [(inputs, "inputs")], False
    return [(image, f"inputs[{index}]") for index, image in enumerate(inputs)], True


def _require_files_only(images: list[Json]) -> None:
    for index, image in enumerate(images):
        if not holds_file(image):
            raise BadInput(
                f"inputs[{index}] is no encoded file as others in the list are; send files and pixels in requests of "
                "their own"
            )


def to_array(image: Json, where: str) -> Array:
    """Check one image: uint8 [H, W], or [H, W, C] with 3 or 4 channels. Raises `BadInput` naming the place."""
    lengths = _lengths(image)
    if len(lengths) not in {2, 3} or 0 in lengths:
        raise BadInput(f"{where}: expected rows of pixels (H x W or H x W x C), got {_describe(lengths)}")
    if len(lengths) == 3 and lengths[2] not in CHANNELS:
        raise BadInput(f"{where}: a pixel has 1, 3 or 4 channels, not {lengths[2]}")
    array = _checked(image, lengths)
    if array is None:
        raise BadInput(_fault(image, lengths, where) or f"{where}: not an image")
    return array[:, :, 0] if lengths[2:] == (1,) else array


def _lengths(value: Json) -> tuple[int, ...]:
    """Lengths of the nested lists along their first entries."""
    lengths = []
    while isinstance(value, list):
        lengths.append(len(value))
        value = value[0] if value else None
    return tuple(lengths)


def _describe(lengths: tuple[int, ...]) -> str:
    if not lengths:
        return "a single value"
    return "an empty list" if 0 in lengths else f"nested lists of {' x '.join(map(str, lengths))} entries"


def _checked(image: Json, lengths: tuple[int, ...]) -> Array | None:
    """The image as uint8 without a Python loop over its pixels, or `None` if anything is wrong with it."""
    leaves: Iterable[Json] = image
    try:
        for _ in lengths[1:]:
            leaves = chain.from_iterable(leaves)
        if not set(map(type, leaves)) <= {int, float}:  # numpy would take booleans and numbers in strings
            return None
        values = np.array(image, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):  # a number among lists, or lists of unequal length
        return None
    whole = (values >= 0) & (values <= 255) & (values == np.floor(values))
    return values.astype(np.uint8) if values.shape == lengths and whole.all() else None


def _fault(value: Json, lengths: tuple[int, ...], where: str) -> str | None:
    """The first thing wrong with an image of these lengths, and its place."""
    if not lengths:
        if type(value) not in {int, float}:
            return f"{where}: expected a number, got {_shown(value)}"
        fits = 0 <= value <= 255 and value == int(value)
        return None if fits else f"{where}: pixels are whole numbers 0..255, got {_shown(value)}"
    if not isinstance(value, list):
        return f"{where}: expected a list of {lengths[0]} entries, got {_shown(value)}"
    if len(value) != lengths[0]:
        return f"{where}: expected {lengths[0]} entries as in the first list, got {len(value)}"
    faults = (_fault(item, lengths[1:], f"{where}[{index}]") for index, item in enumerate(value))
    return next((fault for fault in faults if fault), None)


def _shown(value: Json) -> str:
    """The value as JSON, shortened."""
    text = orjson.dumps(value).decode()
    return text if len(text) <= 40 else f"{text[:37]}..."
