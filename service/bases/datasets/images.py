"""`data: {images: FOLDER}`: JPEG and PNG files, prepared by the base's own codec, so that data and requests agree.

The kind of a file is told by its first bytes, as the service tells it for an upload, and its class by the folder it
lies in or by the number its name begins with. Files are decoded when a batch is drawn; a damaged one is named.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from service.bases.checkpoints import file_digest
from service.bases.data_declaration import ImageData
from service.bases.datasets.class_labels import checked_numbers, class_numbers, require_labels
from service.bases.datasets.splits import Rows
from service.bases.datasets.tables import PreparedData, TableRows
from service.contracts import Array, Arrays, Codec
from service.errors import BadInput, BodyTooLarge, ConfigError

ENDINGS = {".jpg", ".jpeg", ".png"}
MAGIC = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}
Label = Literal["auto", "folder", "prefix", "none"]


def open_images(declared: ImageData, labels: tuple[str, ...], codec: Codec, folder: Path) -> TableRows:
    """The pictures that the config declares.

    Raises:
        ConfigError: a folder is missing or empty, or a class is not one of `labels`.
    """
    if isinstance(declared.images, Path):
        table = _opened(folder / declared.images, "data.images", declared.label, labels, codec)
        return TableRows("data.images", table, declared.splits, declared.seed)
    tables = {
        split: _opened(folder / path, f"data.images.{split}", declared.label, labels, codec)
        for split, path in declared.images.items()
    }
    return TableRows("data.images", tables, declared.splits, declared.seed)


def _opened(folder: Path, key: str, label: Label, labels: tuple[str, ...], codec: Codec) -> ImageTable:
    if not folder.is_dir():
        raise ConfigError(f"{key}: there is no folder {folder}")
    found = tuple(sorted(_pictures(folder), key=lambda path: path.relative_to(folder).as_posix()))
    if not found:
        raise ConfigError(f"{key}: there is no {', '.join(sorted(ENDINGS))} file in {folder}")
    return ImageTable(folder, found, _classes(folder, found, label, labels), codec)


def _pictures(folder: Path) -> Iterator[Path]:
    """Files with the ending of a picture; hidden ones are what systems and copying leave behind."""
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in ENDINGS and path.is_file() and not hidden:
            yield path


def _classes(folder: Path, files: tuple[Path, ...], label: Label, labels: tuple[str, ...]) -> Array | None:
    """Class number of every file, or `None` without classes."""
    nested = any(path.parent != folder for path in files)
    if label == "none" or (label == "auto" and not (nested and labels)):
        return None
    require_labels(labels, "data.label")
    if label == "prefix":
        numbers = [_number(path) for path in files]
        return checked_numbers(np.array(numbers, dtype=np.int64), labels, "data.label")
    loose = [path for path in files if path.parent == folder]
    if loose:
        raise ConfigError(
            f"data.label: {loose[0]} lies in no folder of a class; move it, or set data.label to prefix or none"
        )
    names = [path.parent.name for path in files]
    return class_numbers(names, labels, f"data.label: folders in {folder} are taken for classes (`none` ignores them)")


def _number(path: Path) -> int:
    found = re.match(r"[0-9]+", path.name)
    if found is None:
        raise ConfigError(f"data.label: the name of {path} begins with no class number, which label prefix asks for")
    return int(found.group())


@dataclass(frozen=True)
class ImageTable:
    """A `tables.Table` of picture files; `classes` has a number per file."""

    folder: Path
    files: tuple[Path, ...]
    classes: Array | None
    codec: Codec

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(path.relative_to(self.folder).as_posix() for path in self.files)

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        return tuple(bytes.fromhex(file_digest(path)) for path in self.files)

    @cached_property
    def digest(self) -> str:
        total = hashlib.sha256(b"".join(self.digests))
        total.update(b"none" if self.classes is None else self.classes.tobytes())
        return total.hexdigest()

    def data(self, rows: Rows) -> PreparedData:
        return PreparedData(rows, self._prepare, self.classes)

    def _prepare(self, rows: Rows) -> Arrays:
        return (np.concatenate([self._decoded(self.files[row]) for row in rows]),)

    def _decoded(self, path: Path) -> Array:
        """A file as the input of the model, float32 [1, C, H, W]: exactly what a request with its bytes becomes."""
        try:
            body = path.read_bytes()
            kind = next((kind for magic, kind in MAGIC.items() if body.startswith(magic)), None)
            if kind is None:
                raise BadInput("it begins like neither a JPEG nor a PNG file")
            return self.codec.decode(kind, body).inputs[0]
        except (BadInput, BodyTooLarge, OSError) as error:
            raise ConfigError(f"data.images: {path} cannot be used: {error}; repair or remove it") from error
