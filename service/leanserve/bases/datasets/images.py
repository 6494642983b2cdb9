"""`data: {images: FOLDER}`: image files, prepared by the base's own codec, so that data and requests agree.

The class of a file is told by the folder it lies in or by the number its name begins with. Files are decoded when a
batch is drawn; damaged ones are named.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from leanserve.bases.checkpoints import file_digest
from leanserve.bases.datasets.class_labels import LabelColumn, class_numbers, require_labels
from leanserve.bases.datasets.image_folder import ImageFolder, by_ending, counted, image_folder
from leanserve.bases.datasets.splits import RowSource
from leanserve.bases.datasets.tables import PreparedData, TableRows
from leanserve.codecs.image_formats import endings
from leanserve.codecs.images import stacked
from leanserve.config.base_section import ImageFiles
from leanserve.config.data_section import ImageData
from leanserve.contracts import Array, Arrays, Codec
from leanserve.errors import BadInput, BodyTooLarge, ConfigError

Label = Literal["auto", "folder", "prefix", "none"]
LOOKED_AT = 10_000
"""Files that are tried once one is found that cannot be decoded, so that all of them can be named at once."""
REFUSALS = (BadInput, BodyTooLarge, OSError)
_log = logging.getLogger(__name__)


def open_images(
    declared: ImageData, labels: tuple[str, ...], files: ImageFiles, codec: Codec, folder: Path
) -> TableRows:
    """The images that the config declares; what is skipped in their folders is logged.

    Raises:
        ConfigError: a folder is missing or without images, one of a class has none that is read, files are no images
            although they are named so, or a class is not one of `labels`.
    """
    if isinstance(declared.images, Path):
        paths = {"data.images": folder / declared.images}
    else:
        paths = {f"data.images.{split}": folder / path for split, path in declared.images.items()}
    read = endings(files.formats)
    folders = {key: image_folder(path, files.formats, key) for key, path in paths.items()}
    for key, found in folders.items():
        _require_images(found, read, key)
    classes = _classes(list(folders.values()), declared.label, labels)
    for key, found in folders.items():
        if found.root in classes and declared.label != "prefix":
            _require_full_classes(found, labels, read, key)
        if found.skipped:
            _log.info("%s: %s", key, found.seen())
    tables = [ImageTable(found.root, found.files, classes.get(found.root), codec) for found in folders.values()]
    cut_splits = tables[0] if isinstance(declared.images, Path) else dict(zip(declared.images, tables, strict=True))
    return TableRows("data.images", cut_splits, declared.splits, declared.seed)


def _require_images(found: ImageFolder, read: str, key: str) -> None:
    if found.damaged:
        raise _unusable(found.damaged, key)
    if not found.files:
        others = f"; other files are skipped: {by_ending(found.skipped)}" if found.skipped else ""
        raise ConfigError(f"{key}: there is no image in {found.root}{others}. Read are {read}")


def _require_full_classes(found: ImageFolder, labels: tuple[str, ...], read: str, key: str) -> None:
    """Refuse folders of a class whose files are all skipped, and tell of empty ones."""
    lost = []
    for folder in (folder for folder in found.without_images if _is_class(folder.name, labels)):
        skipped = found.skipped_below(folder)
        if skipped:
            lost.append(f"{folder} ({by_ending(skipped)})")
        else:
            _log.warning("%s: the folder of the class '%s' is empty: %s", key, folder.name, folder)
    if lost:
        raise ConfigError(
            f"{key}: folders of classes have no image that is read: {counted(lost)}. Convert their files, or remove "
            f"them; read are {read}"
        )


def _is_class(name: str, labels: tuple[str, ...]) -> bool:
    try:
        class_numbers([LabelColumn(np.array([name]), lambda _: name)], labels)
    except ConfigError:
        return False
    return True


def _unusable(reasons: Mapping[Path, str], key: str) -> ConfigError:
    listed = counted([f"{path}: {reason}" for path, reason in reasons.items()], "; ")
    return ConfigError(f"{key}: image files cannot be used: {listed}. Repair or remove them")


def _classes(folders: Sequence[ImageFolder], label: Label, labels: tuple[str, ...]) -> dict[Path, Array]:
    """By folder, the class numbers of its files if they have classes; those of all folders are read in the same way."""
    named = ((found.root, _column(found.root, found.files, label, labels)) for found in folders)
    columns = {root: column for root, column in named if column is not None}
    return dict(zip(columns, class_numbers(list(columns.values()), labels), strict=True))


def _column(folder: Path, files: tuple[Path, ...], label: Label, labels: tuple[str, ...]) -> LabelColumn | None:
    """What names the class of every file, or `None` without classes."""
    nested = any(path.parent != folder for path in files)
    if label == "none" or (label == "auto" and not (nested and labels)):
        return None
    require_labels(labels, "data.label")
    if label == "prefix":
        numbers = np.array([_number(path) for path in files])
        return LabelColumn(numbers, lambda row: f"data.label: the number at the beginning of {files[row]}")
    loose = [path for path in files if path.parent == folder]
    if loose:
        raise ConfigError(
            f"data.label: {loose[0]} lies in no folder of a class; move it, or set data.label to prefix or none"
        )
    names = np.array([path.parent.name for path in files])
    return LabelColumn(names, lambda _: f"data.label: folders in {folder} are taken for classes (`none` ignores them)")


def _number(path: Path) -> str:
    found = re.match(r"[0-9]+", path.name)
    if found is None:
        raise ConfigError(f"data.label: the name of {path} begins with no class number, which label prefix asks for")
    return found.group()


@dataclass(frozen=True)
class ImageTable:
    """A `tables.Table` of image files; `classes` has a number per file."""

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

    def data(self, rows: RowSource) -> PreparedData:
        return PreparedData(rows, self._prepare, self.classes)

    def _prepare(self, rows: RowSource) -> Arrays:
        try:
            return (stacked([self._decoded(self.files[row]) for row in rows]),)
        except REFUSALS as error:
            raise _unusable(self._damaged(rows.tolist()), "data.images") from error

    def _decoded(self, path: Path) -> Array:
        """A file as the input of the model, float32 [C, H, W]: exactly what a request with its bytes becomes."""
        return np.asarray(self.codec.decode("application/octet-stream", path.read_bytes()).inputs[0][0])

    def _damaged(self, first: Sequence[int]) -> dict[Path, str]:
        """What is wrong with each file that cannot be decoded, of `LOOKED_AT` files, those with these numbers first."""
        found = {}
        for row in islice(dict.fromkeys((*first, *range(len(self.files)))), LOOKED_AT):
            try:
                self._decoded(self.files[row])
            except REFUSALS as error:
                found[self.files[row]] = str(error).removeprefix("the body: ")
        return found
