"""A base of images of animals, and rows for it."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import TypeAdapter

from leanserve.bases.datasets.opening import open_rows
from leanserve.bases.description import Description, Tensor
from leanserve.bases.loaded import Rows
from leanserve.bases.opening import codec_of
from leanserve.config.base_section import ImageInput
from leanserve.config.data_section import AnyData
from leanserve.contracts import Array, Codec, Data

IMAGE: dict[str, Any] = {"size": (6, 4), "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
ANIMALS = Description(
    name="animals",
    inputs=(Tensor(name="image", dtype="float32", shape=(3, 4, 6)),),
    outputs=(Tensor(name="logits", dtype="float32", shape=(3,), meaning="logits"),),
    labels=("cat", "dog, Canis familiaris", "polar bear"),
    image=ImageInput(**IMAGE),
)
NAMELESS = ANIMALS.model_copy(update={"labels": ()})
PAIRS = Description(
    name="pairs",
    inputs=(Tensor(name="left", dtype="float32", shape=(2,)), Tensor(name="right", dtype="int64", shape=(None,))),
    outputs=(Tensor(name="logits", dtype="float32", shape=(2,), meaning="logits"),),
    labels=("no", "yes"),
)


def codec(description: Description = ANIMALS) -> Codec:
    return codec_of(description, description.spec())


def rows(declared: dict[str, Any], folder: Path, description: Description = ANIMALS) -> Rows:
    data: AnyData = TypeAdapter(AnyData).validate_python(declared)
    return open_rows(data, description, codec(ANIMALS if description.image is None else description), folder)


def image(seed: int, size: tuple[int, int] = (9, 7)) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)


def save(folder: Path, name: str, seed: int) -> bytes:
    """An image as a file of this name; its bytes."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = BytesIO()
    Image.fromarray(image(seed)).save(buffer, "PNG" if name.endswith("png") else "JPEG")
    path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def everything(data: Data, shuffle_seed: int | None = None) -> tuple[Array, Array | None]:
    """First inputs and labels of all rows."""
    batches = list(data.batches(3, shuffle_seed))
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return np.concatenate([batch.inputs[0] for batch in batches]), np.concatenate(labels) if labels else None
