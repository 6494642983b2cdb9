"""The contract of a step of post-processing: typed options and one `apply`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from leanserve.codecs.postprocess.columns import Columns
from leanserve.contracts import Array, Arrays, Json, Placement, TensorSpec
from leanserve.errors import BackendFailed, ConfigError

Labels = tuple[str, ...] | Path


class PostStep(BaseModel):
    """One step. Subclasses add `kind` and their options.

    `writes` is the name of its answer where the config gives none; `costly` steps take long, however small their input.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    output: str | None = Field(
        None,
        description="what it reads: an output of the model, or what an earlier step wrote; of one output: that",
    )
    name: str | None = Field(None, min_length=1, pattern=r"^[^,.]+$", description="what its answer is called")

    writes: ClassVar[str]
    costly: ClassVar[bool] = False
    shape: ClassVar[Json]
    """JSON schema of its answer to one row."""

    @property
    def reads(self) -> tuple[str | None, ...]:
        """Names of what it reads; `None`: the only output."""
        return (self.output,)

    def with_files(self, folder: Path) -> Self:
        """With what it names as files read; paths are relative to `folder`. Raises `ConfigError`."""
        return self

    def fitted(self, fields: Sequence[TensorSpec], labels: tuple[str, ...]) -> Self:
        """This step for a model that gives such tensors, and names its classes by `labels`.

        Raises:
            ConfigError: it cannot read them; the text says what they would have to be.
        """
        raise NotImplementedError

    def gives(self, fields: Sequence[TensorSpec]) -> TensorSpec | None:
        """What a later step may read of it; `None`: it is an end."""
        return None

    def apply(self, arrays: Arrays, places: Sequence[Placement]) -> Columns:
        """The answer to a batch: `arrays` [rows, ...] as `reads` names them; `places` of images, empty if unknown."""
        raise NotImplementedError


def lines_of(folder: Path, path: Path, key: str) -> tuple[str, ...]:
    """The lines of a text file, spaces included. Raises `ConfigError` naming the key."""
    try:
        return tuple((folder / path).read_text(encoding="utf-8").removesuffix("\n").split("\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}: cannot read {folder / path}: {error}") from error


def label_names(labels: Labels | None, folder: Path) -> tuple[str, ...] | None:
    """Class names, of a file one per line without the spaces around it. Raises `ConfigError`."""
    if not isinstance(labels, Path):
        return labels
    return tuple(line.strip() for line in lines_of(folder, labels, "labels") if line.strip())


def fitting_labels(own: Labels | None, of_base: tuple[str, ...], classes: int | None) -> tuple[str, ...] | None:
    """The names of so many classes: the step's own, else the base's if there are as many, else none.

    Raises:
        ConfigError: the step's own are not as many.
    """
    if own is None:
        return of_base if classes is not None and len(of_base) == classes else None
    assert not isinstance(own, Path)  # `with_files`
    if classes is not None and len(own) != classes:
        raise ConfigError(f"labels: there are {len(own)} for {classes} classes")
    return own


def shown(field: TensorSpec) -> str:
    """A tensor, for an error."""
    return f"'{field.name}' {field.dtype} [{', '.join('any' if size is None else str(size) for size in field.shape)}]"


def require_numbers(field: TensorSpec, axes: int, wanted: str) -> None:
    """Raise `ConfigError` unless it has floats and so many axes per row."""
    if len(field.shape) != axes or not field.dtype.startswith(("float", "bfloat")):
        raise ConfigError(f"it reads {wanted}; the model's {shown(field)} is not that")


def require_no_nan(array: Array, what: str) -> None:
    """Raise `BackendFailed` where a number is none."""
    if np.isnan(array).any():
        raise BackendFailed(f"the model's {what} are not finite in row {int(np.argwhere(np.isnan(array))[0][0])}")


def classes_told(numbers: Array, labels: tuple[str, ...] | None) -> dict[str, Array]:
    """Class numbers as the column that tells them: `label` where they have names, else `class`."""
    if labels is None:
        return {"class": numbers.astype(np.int64)}
    return {"label": np.array(labels, object)[numbers]}
