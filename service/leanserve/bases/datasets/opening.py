"""From the config's `data:` to rows; `{synthetic: N}` needs no file, it is random rows for a first look at speed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import prod
from pathlib import Path

from leanserve.bases.datasets.arrays import open_arrays
from leanserve.bases.datasets.columns import open_columns
from leanserve.bases.datasets.images import open_images
from leanserve.bases.datasets.sounds import open_sounds
from leanserve.bases.datasets.texts import open_texts
from leanserve.bases.description import Description
from leanserve.bases.loaded import Rows
from leanserve.config.data_section import AnyData, ArrayFileData, ImageData, SyntheticData, TableData, TextData
from leanserve.contracts import ArrayData, Codec, ModelSpec, Split
from leanserve.errors import ConfigError

SYNTHETIC_LENGTH = 32
"""Length of dynamic axes in synthetic rows."""
MOST_DRAWN = 2**30
"""Numbers of all synthetic rows of a split: 8 GiB while they are drawn."""
SEEDS: dict[Split, int] = {"train": 1, "calibration": 2, "gate": 3, "test": 4}


def open_rows(
    data: AnyData,
    description: Description,
    codec: Codec,
    folder: Path,
    spec: ModelSpec | None = None,
    *,
    own_labels: bool = False,
) -> Rows:
    """The rows that the config declares, prepared by `codec` for a model of `spec` (by default the described one).

    `own_labels`: they are what the configured score takes, of whatever form.

    Raises:
        ConfigError: files are missing or damaged, or do not suit the model; the text names the key.
    """
    spec = spec or description.spec()
    if isinstance(data, SyntheticData):
        rows = SyntheticRows(spec, data.synthetic, min(SYNTHETIC_LENGTH, spec.max_length))
        if rows.elements > MOST_DRAWN:
            most = MOST_DRAWN * rows.count // rows.elements
            raise ConfigError(
                f"data.synthetic: {rows.count} rows of this model are too many to draw; at most {most} are"
            )
        return rows
    if isinstance(data, ArrayFileData):
        return open_arrays(data, spec, codec, folder, own_labels=own_labels)
    if isinstance(data, TableData):
        return open_columns(data, spec, codec, folder, own_labels=own_labels)
    if isinstance(data, ImageData):
        if description.image is None:
            raise ConfigError("data.images: the model takes no images; if it does, say how with base.image")
        return open_images(data, description.labels, description.image, codec, folder)
    if isinstance(data, TextData):
        return open_texts(data, spec, codec, folder, own_labels=own_labels)
    return open_sounds(data, spec, codec, folder, own_labels=own_labels)


@dataclass(frozen=True)
class SyntheticRows:
    """A `bases.loaded.Rows` without labels; every split is drawn with a seed of its own."""

    spec: ModelSpec
    count: int
    length: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"synthetic {self.count} {self.length}".encode()).hexdigest()

    @property
    def unit(self) -> int:
        return 1

    @property
    def elements(self) -> int:
        """Numbers of all rows of a split."""
        sizes = [[self.length if size is None else size for size in item.shape] for item in self.spec.inputs]
        return self.count * sum(map(prod, sizes))

    def split(self, split: Split, n: int | None) -> ArrayData:
        rows = self.count if n is None else min(n, self.count)
        return ArrayData(tuple(array[:rows] for array in self.spec.example(self.count, self.length, SEEDS[split])))
