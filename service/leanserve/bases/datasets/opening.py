"""From the config's `data:` to rows."""

from __future__ import annotations

from pathlib import Path

from leanserve.bases.datasets.arrays import open_arrays
from leanserve.bases.datasets.images import open_images
from leanserve.bases.datasets.synthetic import SyntheticRows
from leanserve.bases.datasets.texts import open_texts
from leanserve.bases.description import Description
from leanserve.bases.loaded import Rows
from leanserve.config.data_section import AnyData, ArrayFileData, ImageData, SyntheticData, TextData
from leanserve.contracts import Codec, ModelSpec
from leanserve.errors import ConfigError

SYNTHETIC_LENGTH = 32
"""Length of dynamic axes in synthetic rows."""


def open_rows(
    data: AnyData, description: Description, codec: Codec, folder: Path, spec: ModelSpec | None = None
) -> Rows:
    """The rows that the config declares, prepared by `codec` for a model of `spec` (by default the described one).

    Raises:
        ConfigError: files are missing or damaged, or do not suit the model; the text names the key.
    """
    spec = spec or description.spec()
    if isinstance(data, SyntheticData):
        return SyntheticRows(spec, data.synthetic, min(SYNTHETIC_LENGTH, spec.max_length))
    if isinstance(data, ArrayFileData):
        return open_arrays(data, spec, codec, folder)
    if isinstance(data, ImageData):
        if description.image is None:
            raise ConfigError("data.images: the model takes no images; if it does, say how with base.image")
        return open_images(data, description.labels, description.image, codec, folder)
    if isinstance(data, TextData):
        return open_texts(data, spec, codec, folder)
    raise ConfigError(f"data.{data.kind}")
