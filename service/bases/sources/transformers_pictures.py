"""`preprocessor_config.json` of a transformers checkpoint as the picture's way into the model.

The library has one class per architecture with defaults of its own; what the file says is read, and what it leaves open
or does in a way that the codec of pictures does not is asked for, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from service.bases.declaration import ImageInput, Resize
from service.contracts import Json
from service.errors import ConfigError

FILTERS: Mapping[int, Resize] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers."""
LARGE = 384
"""ConvNeXt's preprocessing stretches from this size on, and cuts out the centre below it (Liu et al. 2022)."""


def picture_input(said: Mapping[str, Json]) -> ImageInput:
    """How a picture becomes the input, by the file's content.

    Raises:
        ConfigError: not everything is said, or something is asked for that the service does not do.
    """
    if not said.get("do_resize", True):
        raise _ask("not to resize")
    scale = float(said.get("rescale_factor", 1 / 255))
    if not said.get("do_rescale", True) or not math.isclose(scale, 1 / 255, rel_tol=1e-3):
        raise _ask(f"to scale pixels by {scale:.4g}, not by 1/255")
    if said.get("resample") not in FILTERS:
        raise _ask("not to say by which filter (resample) pictures are resized")
    mean, std = ([0.0] * 3, [1.0] * 3) if not said.get("do_normalize", True) else _statistics(said)
    width, height, short = _sizes(said)
    return ImageInput(
        size=(width, height),
        fit="stretch" if short is None else "crop",
        crop=1.0 if short is None else _share(min(width, height), short),
        resize=FILTERS[said["resample"]],
        mean=tuple(mean),
        std=tuple(std),
    )


def _statistics(said: Mapping[str, Json]) -> tuple[list[float], list[float]]:
    mean, std = said.get("image_mean"), said.get("image_std")
    if not isinstance(mean, list) or not isinstance(std, list) or not len(mean) == len(std) == 3:
        raise _ask("not to give mean and standard deviation of three channels")
    return mean, std


def _sizes(said: Mapping[str, Json]) -> tuple[int, int, int | None]:
    """Width and height of the input, and the short side to which pictures are resized before the centre is cut out."""
    size, cropped = said.get("size"), said.get("do_center_crop", False)
    if isinstance(size, dict) and "shortest_edge" in size:
        short = int(size["shortest_edge"])
        if cropped:
            return *_box(said.get("crop_size")), short
        if said.get("crop_pct"):
            return (short, short, int(short / said["crop_pct"])) if short < LARGE else (short, short, None)
        raise _ask("to keep pictures of different shapes")
    if cropped:
        raise _ask("to distort pictures before they cut out the centre")
    return *_box(size), None


def _box(size: Json) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return int(size["width"]), int(size["height"])
    raise _ask(f"to give no size of width and height ({size})")


def _share(side: int, short: int) -> float:
    """The share of the short side that is kept, such that dividing by it rounds down to `short` again."""
    share = min(1.0, side / short)
    return share if math.floor(side / share) == short else side / (short + 0.5)


def _ask(what: str) -> ConfigError:
    return ConfigError(
        f"base.image: the checkpoint's preprocessor_config.json cannot be followed, it seems {what}; declare the key"
    )
