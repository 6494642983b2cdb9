"""`data: {sounds: FOLDER}` or `{sounds: TABLE}`: recordings, prepared by the base's own codec as requests are.

A model of fixed length gets a recording in frames, each of which is a row. All rows of a recording share a split:
neighbouring frames, of the same voice in the same room, would make a gate too easy. The class of a recording is the
name of its folder or stands in the table. Only headers are read before a batch is drawn.
"""

from __future__ import annotations

import hashlib
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from leanserve.bases.checkpoints import file_digest
from leanserve.bases.datasets.class_labels import LabelColumn, require_labels
from leanserve.bases.datasets.image_folder import by_ending
from leanserve.bases.datasets.labels import understanding_of_column
from leanserve.bases.datasets.splits import RowSource
from leanserve.bases.datasets.tables import PreparedData, TableRows, tables_of
from leanserve.bases.datasets.text_files import FORMATS, read_lines
from leanserve.codecs.audio import AudioCodec
from leanserve.codecs.audio_files import AUDIO_FORMATS
from leanserve.config.data_section import SoundData
from leanserve.contracts import Array, Arrays, Codec, ModelSpec
from leanserve.errors import BadInput, BodyTooLarge, ConfigError

UNTOLD = "application/octet-stream"
REFUSALS = (BadInput, BodyTooLarge, OSError)
T = TypeVar("T")
_log = logging.getLogger(__name__)


class Recordings(NamedTuple):
    """The files of one source, and what names the class or the number of each."""

    root: Path
    files: tuple[Path, ...]
    column: LabelColumn | None


def open_sounds(
    declared: SoundData, spec: ModelSpec, codec: Codec, folder: Path, *, own_labels: bool = False
) -> TableRows:
    """The recordings that the config declares; `own_labels`: the configured score takes the labels as they are.

    Raises:
        ConfigError: the model takes no sounds, a source is missing, without recordings or names one that is not there,
            or labels do not suit the model.
    """
    if not isinstance(codec, AudioCodec):
        raise ConfigError("data.sounds: the model takes no sounds; if it does, say how with base.audio")
    # Requests are bounded; a training set need not be.
    codec = replace(codec, max_seconds=math.inf, max_decoded=sys.maxsize, max_elements=sys.maxsize)
    tables = tables_of(
        "data.sounds",
        declared.sounds,
        folder,
        lambda paths: _tables(paths, declared, spec, codec, own_labels=own_labels),
    )
    return TableRows("data.sounds", tables, declared.splits, declared.seed)


def _tables(
    paths: Mapping[str, Path], declared: SoundData, spec: ModelSpec, codec: AudioCodec, *, own_labels: bool
) -> list[SoundTable]:
    """A table per source, by the key that names it; the labels of all of them are read in the same way."""
    found = [_recordings(path, declared, spec, key) for key, path in paths.items()]
    columns = [item.column for item in found if item.column is not None]
    labels = iter(understanding_of_column(spec, own_labels=own_labels)(columns) if columns else ())
    return [SoundTable(item, None if item.column is None else next(labels), codec) for item in found]


def sounds_below(root: Path) -> tuple[list[Path], list[Path]]:
    """The recordings in a folder and below it by their endings, in the order of their names, and all other files."""
    paths = sorted(path for path in root.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(root)))
    found = {path for path in paths if path.suffix.lower().removeprefix(".") in AUDIO_FORMATS}
    return [path for path in paths if path in found], [path for path in paths if path not in found]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _recordings(path: Path, declared: SoundData, spec: ModelSpec, key: str) -> Recordings:
    if path.is_dir():
        return _of_folder(path, declared.label, spec, key)
    if path.suffix in FORMATS and path.is_file():
        return _of_table(path, declared, key)
    raise ConfigError(f"{key}: {path} is neither a folder of recordings nor a table of them ({', '.join(FORMATS)})")


def _of_folder(root: Path, label: str | int, spec: ModelSpec, key: str) -> Recordings:
    """Recordings with the names of their folders, where those are classes."""
    if label not in {"auto", "folder", "none"}:
        raise ConfigError(f"data.label: {root} is a folder, whose label is auto, folder or none; {label!r} is a column")
    files, skipped = sounds_below(root)
    if skipped:
        _log.info(
            "%s: %d recordings; %d other files are skipped: %s", key, len(files), len(skipped), by_ending(skipped)
        )
    if not files:
        raise ConfigError(f"{key}: there is no recording in {root}; read are {', '.join(AUDIO_FORMATS)}")
    nested = any(path.parent != root for path in files)
    if label == "none" or (label == "auto" and not (nested and spec.labels)):
        return Recordings(root, tuple(files), None)
    require_labels(spec.labels, "data.label")
    if loose := [path for path in files if path.parent == root]:
        raise ConfigError(f"data.label: {loose[0]} lies in no folder of a class; move it, or set data.label to none")
    names = np.array([path.parent.name for path in files])
    place = f"data.label: folders in {root} are taken for classes (`none` ignores them)"
    return Recordings(root, tuple(files), LabelColumn(names, lambda _: place))


def _of_table(path: Path, declared: SoundData, key: str) -> Recordings:
    """Recordings that lie where a table says, from its own folder on."""
    column = None if declared.label in {"auto", "none"} else declared.label
    lines = read_lines(path, (declared.file, *([] if column is None else [column])))
    if not lines:
        raise ConfigError(f"{key}: {path} names no recording")
    files = tuple(path.parent / line.values[0] for line in lines)
    if missing := [row for row, file in enumerate(files) if not file.is_file()]:
        raise ConfigError(f"{key}: {path}:{lines[missing[0]].number}: there is no file {files[missing[0]]}")
    if column is None:
        return Recordings(path.parent, files, None)
    values = np.array([line.values[1] for line in lines])
    return Recordings(path.parent, files, LabelColumn(values, lambda row: f"{path}:{lines[row].number}: {column}"))


@dataclass(frozen=True)
class SoundTable:
    """A `tables.Table` of frames, or of whole recordings for a model of any length; `labels` has one per recording."""

    recordings: Recordings
    labels: Array | None
    codec: AudioCodec

    @cached_property
    def digest(self) -> str:
        total = hashlib.sha256(b"".join(self._contents))
        total.update(f"{self.codec.rate} {self.codec.hop} {self.codec.field.shape}".encode())
        total.update(b"none" if self.labels is None else self.labels.tobytes())
        return total.hexdigest()

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        """Those of the recordings: frames of one stay together."""
        return tuple(self._contents[file] for file in self._files)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.recordings.files[file].name for file in self._files)

    def data(self, rows: RowSource) -> PreparedData:
        return PreparedData(rows, self._prepare, None if self.labels is None else self.labels[self._files])

    @cached_property
    def _contents(self) -> tuple[bytes, ...]:
        return tuple(bytes.fromhex(file_digest(path)) for path in self.recordings.files)

    @cached_property
    def _counts(self) -> Array:
        """Rows of each recording."""
        return np.array([_read(path, self.codec.count_rows) for path in self.recordings.files], np.int64)

    @cached_property
    def _files(self) -> Array:
        """By row, the number of its recording."""
        return np.repeat(np.arange(len(self._counts)), self._counts)

    def _prepare(self, rows: RowSource) -> Arrays:
        files = self._files[rows]
        frames = rows - (np.cumsum(self._counts) - self._counts)[files]
        decoded = {file: _read(self.recordings.files[file], self._decoded) for file in np.unique(files)}
        # A resampled recording may end a sample before its header let expect, and so a frame earlier.
        found = [decoded[file][min(frame, len(decoded[file]) - 1)] for file, frame in zip(files, frames, strict=True)]
        return (_filled_up(found),)

    def _decoded(self, content: bytes) -> Array:
        return np.asarray(self.codec.decode(UNTOLD, content).inputs[0])


def _read(path: Path, understand: Callable[[bytes], T]) -> T:
    """What a file's content is understood as."""
    try:
        return understand(path.read_bytes())
    except REFUSALS as error:
        reason = str(error).removeprefix("the body").lstrip(": ")
        raise ConfigError(f"data.sounds: {path} cannot be used: {reason}. Repair or remove it") from error


def _filled_up(rows: Sequence[Array]) -> Array:
    """Rows of samples as one batch; shorter ones end in silence, as they do when requests share a batch."""
    shape = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
    batch = np.zeros((len(rows), *shape), np.float32)
    for place, row in zip(batch, rows, strict=True):
        place[tuple(slice(size) for size in row.shape)] = row
    return batch
