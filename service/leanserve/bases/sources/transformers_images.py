"""`preprocessor_config.json` of a transformers checkpoint as the image's way into the model.

The library has one class per architecture, each with defaults and habits of its own. Those of the common ones are read
here; of others, and where the file leaves something open, the config is asked, because a guess would only show as
slightly worse answers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from leanserve.config.base_section import ImageInput, Resize
from leanserve.contracts import Json
from leanserve.errors import ConfigError

FILTERS: Mapping[int, Resize] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's numbers."""
KNOWN = ("ViT", "CLIP", "Bit", "MobileNetV2", "ConvNext")
"""Classes that resize, cut out the centre, scale and normalise, and do nothing else."""
LARGE, CROP = 384, 224 / 256
"""ConvNext's stretches to sizes from the first on; below, the second is the share that it keeps (Liu et al. 2022)."""


def preprocessor_input(said: Mapping[str, Json]) -> ImageInput:
    """How an image becomes the input, by the file's content.

    Raises:
        ConfigError: not everything is said, or something is asked for that the service does not do.
    """
    kind = _kind(said)
    if not said.get("do_resize", True):
        raise _ask("it does not resize")
    scale = float(said.get("rescale_factor", 1 / 255))
    if not said.get("do_rescale", True) or not math.isclose(scale, 1 / 255, rel_tol=1e-3):
        raise _ask("it does not scale pixels by 1/255")
    if said.get("resample") not in FILTERS:
        raise _ask("it does not say by which filter (resample) images are resized")
    mean, std = _statistics(said) if said.get("do_normalize", True) else ([0.0] * 3, [1.0] * 3)
    width, height, short = _convnext_sizes(said) if kind == "ConvNext" else _sizes(said)
    return ImageInput(
        size=(width, height),
        fit="stretch" if short is None else "crop",
        crop=1.0 if short is None else _share(min(width, height), short),
        resize=FILTERS[said["resample"]],
        mean=tuple(mean),
        std=tuple(std),
    )


def _kind(said: Mapping[str, Json]) -> str:
    name = str(said.get("image_processor_type") or said.get("feature_extractor_type") or "a class without a name")
    kind = re.sub("(FeatureExtractor|ImageProcessor)(Fast|Pil)?$", "", name)
    if kind not in KNOWN:
        raise _ask(f"it is for {name}")
    return kind


def _statistics(said: Mapping[str, Json]) -> tuple[list[float], list[float]]:
    mean, std = said.get("image_mean"), said.get("image_std")
    if not isinstance(mean, list) or not isinstance(std, list) or not len(mean) == len(std) == 3:
        raise _ask("it does not give mean and standard deviation of three channels")
    return mean, std


def _sizes(said: Mapping[str, Json]) -> tuple[int, int, int | None]:
    """Width and height of the input, and the short side to which images are resized before the centre is cut out."""
    size, cropped = said.get("size"), said.get("do_center_crop", False)
    if not isinstance(size, dict) or "shortest_edge" not in size:
        if cropped:
            raise _ask("it distorts images before it cuts out the centre")
        return *_box(size), None
    if not cropped:
        raise _ask("it leaves images in different shapes")
    width, height = _box(said.get("crop_size"))
    if max(width, height) > int(size["shortest_edge"]):
        raise _ask("it pads images")
    return width, height, int(size["shortest_edge"])


def _convnext_sizes(said: Mapping[str, Json]) -> tuple[int, int, int | None]:
    size = said.get("size")
    side = size.get("shortest_edge") if isinstance(size, dict) else size
    if not isinstance(side, int):
        raise _ask(f"its size is {size}")
    return side, side, None if side >= LARGE else int(side / float(said.get("crop_pct") or CROP))


def _box(size: Json) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return int(size["width"]), int(size["height"])
    raise _ask(f"its size is {size}")


def _share(side: int, short: int) -> float:
    """The share of the short side that is kept, such that dividing by it rounds down to `short` again."""
    return side / short if math.floor(side / (side / short)) == short else side / (short + 0.5)


def _ask(why: str) -> ConfigError:
    return ConfigError(
        f"base.image: the checkpoint's preprocessor_config.json cannot be followed, {why}; declare the key"
    )
