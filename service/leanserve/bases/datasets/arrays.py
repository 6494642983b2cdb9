"""`data: {arrays: FILE.npz}`: rows that are arrays already, or images as an array of pixels.

Names, shapes and dtypes are read from the headers alone, so that a wrong file is refused at once and a start from the
cache loads no rows. Pickled objects in the file are refused: loading one can run any code.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from leanserve.bases.checkpoints import file_digest
from leanserve.bases.datasets.class_labels import LabelColumn
from leanserve.bases.datasets.labels import LabelFiles, as_given, require_target, understanding
from leanserve.bases.datasets.splits import RowSource
from leanserve.bases.datasets.tables import PreparedData, TableRows
from leanserve.codecs.images import ImageCodec, stacked
from leanserve.config.data_section import ArrayFileData
from leanserve.contracts import Array, Arrays, Codec, ModelSpec, TensorSpec
from leanserve.disk import open_regular
from leanserve.errors import ConfigError
from leanserve.texts import STRING


class Header(NamedTuple):
    """What the file tells about an array before its data."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def open_arrays(
    declared: ArrayFileData, spec: ModelSpec, codec: Codec, folder: Path, *, own_labels: bool = False
) -> TableRows:
    """The arrays that the config declares; `own_labels`: the configured score takes the labels as they are.

    Raises:
        ConfigError: a file is missing or damaged, lacks an array, or an array does not fit the model.
    """
    if isinstance(declared.arrays, Path):
        path = folder / declared.arrays
        labels = _labels([path], declared, spec, own_labels=own_labels)
        table = _opened(path, "data.arrays", declared, labels, spec, codec)
        return TableRows("data.arrays", table, declared.splits, declared.seed)
    paths = {split: folder / path for split, path in declared.arrays.items()}
    labels = _labels(paths.values(), declared, spec, own_labels=own_labels)
    tables = {
        split: _opened(path, f"data.arrays.{split}", declared, labels, spec, codec) for split, path in paths.items()
    }
    return TableRows("data.arrays", tables, declared.splits, declared.seed)


def first_rows(declared: ArrayFileData, names: Sequence[str], folder: Path, rows: int = 8) -> list[Array] | None:
    """The first rows of the arrays for inputs of these names, in their order, before anything is known of the inputs.

    `None` where there are none for all of them; what is wrong with the file is told when it is opened.
    """
    path = _first_file(declared, folder)
    named = declared.inputs if isinstance(declared.inputs, dict) else {}
    wanted = [declared.inputs] if isinstance(declared.inputs, str) else [named.get(name, name) for name in names]
    try:
        found = headers(path, "data.arrays")
        return [_load(path, name)[:rows] for name in wanted] if found.keys() >= set(wanted) else None
    except ConfigError:
        return None


def shapes_told(declared: ArrayFileData, folder: Path) -> str:
    """Names and shapes of the arrays of which `first_rows` reads some; empty where there is no file."""
    try:
        found = headers(_first_file(declared, folder), "data.arrays")
    except ConfigError:
        return ""
    return f"{declared.inputs} {sorted((name, str(header)) for name, header in found.items())}"


def _first_file(declared: ArrayFileData, folder: Path) -> Path:
    files = declared.arrays
    return folder / (files if isinstance(files, Path) else next(iter(files.values())))


def _labels(paths: Iterable[Path], declared: ArrayFileData, spec: ModelSpec, *, own_labels: bool) -> LabelFiles | None:
    if declared.labels is None:
        return None
    understood = as_given if own_labels else understanding(spec, "data.labels")
    return LabelFiles({path: partial(_column, path, declared.labels) for path in paths}, understood)


def _opened(
    path: Path, key: str, declared: ArrayFileData, labels: LabelFiles | None, spec: ModelSpec, codec: Codec
) -> ArrayTable:
    found = headers(path, key)
    names = _array_names(declared, spec)
    for asked, name in (*(("data.inputs", name) for name in names), ("data.labels", declared.labels)):
        if name is not None and name not in found:
            raise ConfigError(f"{asked}: there is no array '{name}' in {path}; it has {', '.join(found) or 'none'}")
    used = {name: found[name] for name in (*names, declared.labels) if name is not None}
    lengths = {name: (*header.shape, 0)[0] for name, header in used.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"{key}: the arrays of {path} differ in length: {lengths}")
    if declared.labels is not None and labels is not None and labels.understood is not as_given:
        _require_labels(found[declared.labels], spec, f"data.labels: the array '{declared.labels}' of {path}")
    pixels = codec if isinstance(codec, ImageCodec) and _are_pixels(found[names[0]]) else None
    if pixels is None:
        for name, field in zip(names, spec.inputs, strict=True):
            _require_fit(found[name], field, f"data.inputs: the array '{name}' of {path}")
    return ArrayTable(path, names, declared.labels, labels, spec, pixels)


def _require_labels(header: Header, spec: ModelSpec, what: str) -> None:
    """Check that the labels are a class per row, or numbers that an output should be."""
    if not spec.labels and header.dtype.kind in "iuf":
        require_target(spec, header.shape[1:], what)
        return
    if not spec.labels or header.shape[1:] not in {(), (1,)} or header.dtype.kind not in "biufUS":
        wanted = "class numbers or names, one per row" if spec.labels else "numbers (classes need base.labels)"
        raise ConfigError(f"{what} is {header}; labels are {wanted}")


def headers(path: Path, key: str) -> dict[str, Header]:
    """Shape and dtype of every array of a `.npz` file; no data is read.

    Raises:
        ConfigError: the file is missing, not of this format, or holds Python objects.
    """
    try:
        with open_regular(path) as stream, zipfile.ZipFile(stream) as archive:
            found = {name.removesuffix(".npy"): _header(archive, name) for name in archive.namelist()}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{key}: {path} is not a .npz file that can be read: {error}") from error
    objects = [name for name, header in found.items() if header.dtype.hasobject]
    if objects:
        raise ConfigError(
            f"{key}: the array '{objects[0]}' of {path} holds pickled Python objects, which are not read: loading them "
            "can run any code. Save numbers, or strings of a fixed length (array.astype(str))"
        )
    return found


def _header(archive: zipfile.ZipFile, name: str) -> Header:
    with archive.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    return Header(shape, dtype)


def _array_names(declared: ArrayFileData, spec: ModelSpec) -> tuple[str, ...]:
    """The name of the array for every input of the model, in its order."""
    inputs = [field.name for field in spec.inputs]
    if isinstance(declared.inputs, str):
        if len(inputs) > 1:
            raise ConfigError(f"data.inputs: the model takes {', '.join(inputs)}; name the array of each in a mapping")
        return (declared.inputs,)
    named: Mapping[str, str] = declared.inputs or {}
    unknown = [name for name in named if name not in inputs]
    if unknown:
        raise ConfigError(f"data.inputs: the model has no input '{unknown[0]}'; it takes {', '.join(inputs)}")
    return tuple(named.get(name, name) for name in inputs)


def _are_pixels(header: Header) -> bool:
    colour = len(header.shape) == 4 and header.shape[3] in {1, 3, 4}
    return header.dtype == np.uint8 and (colour or len(header.shape) == 3)


def _require_fit(header: Header, field: TensorSpec, what: str) -> None:
    """Check that rows are the input `field` as they are; nothing is converted that could lose a digit."""
    fits = len(header.shape) == len(field.shape) + 1 and all(
        wanted in (None, size) for size, wanted in zip(header.shape[1:], field.shape, strict=True)
    )
    if fits and (header.dtype.kind == "U" if field.dtype == STRING else np.can_cast(header.dtype, field.dtype, "safe")):
        return
    wanted = ", ".join("any" if size is None else str(size) for size in field.shape)
    pixels = ", or images uint8 [rows, height, width, 3] if base.image tells how" if len(field.shape) == 3 else ""
    raise ConfigError(f"{what} is {header}; the input '{field.name}' takes {field.dtype} [rows, {wanted}]{pixels}")


@dataclass(frozen=True)
class ArrayTable:
    """A `tables.Table` over arrays of equal length, held in memory once a row is asked for."""

    path: Path
    inputs: tuple[str, ...]
    """Names of the arrays, in the order of the model's inputs."""
    label: str | None
    """Name of the array of labels."""
    labels: LabelFiles | None
    spec: ModelSpec
    pixels: ImageCodec | None
    """What prepares the rows if they are images of uint8; `None`: they are inputs already."""

    @cached_property
    def digest(self) -> str:
        named = " ".join((*self.inputs, self.label or ""))
        return hashlib.sha256(f"{file_digest(self.path)} {named}".encode()).hexdigest()

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        rows = zip(*self._arrays, strict=True)
        return tuple(hashlib.sha256(b"".join(part.tobytes() for part in row)).digest() for row in rows)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(f"row {row}" for row in range(len(self._arrays[0])))

    def data(self, rows: RowSource) -> PreparedData:
        return PreparedData(rows, self._prepare, None if self.labels is None else self.labels.of(self.path))

    def _prepare(self, rows: RowSource) -> Arrays:
        if self.pixels is not None:
            images = self._arrays[0][rows]
            return (stacked([self.pixels.row(Image.fromarray(_plain(image))) for image in images]),)
        parts = zip(self._arrays, self.spec.inputs, strict=True)
        return tuple(array[rows].astype(field.array_dtype, copy=False) for array, field in parts)

    @cached_property
    def _arrays(self) -> Arrays:
        return tuple(_load(self.path, name) for name in self.inputs)


def _column(path: Path, name: str) -> LabelColumn:
    found = _load(path, name)
    found = found.astype(str) if found.dtype.kind == "S" else found
    return LabelColumn(found, lambda row: f"data.labels: the array '{name}' of {path}: row {row}")


def _plain(image: Array) -> Array:
    """Grey images without an axis of channels, as Pillow takes them."""
    return image[:, :, 0] if image.shape[2:] == (1,) else image


def _load(path: Path, name: str) -> Array:
    try:
        with open_regular(path) as stream, np.load(stream, allow_pickle=False) as stored:
            return np.asarray(stored[name])
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ConfigError(f"data.arrays: the array '{name}' of {path} is damaged: {error}") from error
