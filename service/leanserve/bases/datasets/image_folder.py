"""What lies in a folder of images: the files that are read, those that are not, and folders without any image.

Folders come from cameras, downloads and archives, so that endings lie and other files lie around. A file is told by its
first bytes, as the service tells an upload, if its ending is that of an image or if it has none. All others are
counted, because a class whose files are all of a kind that is not read must not vanish in silence.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from leanserve.codecs.image_formats import ENDINGS, HEAD, FormatName, recognised
from leanserve.errors import ConfigError

SHOWN = 4
LEFT_BEHIND = "__MACOSX"
"""A folder in archives that macOS makes; what other systems leave behind begins with a dot."""


@dataclass(frozen=True)
class ImageFolder:
    """One folder with all below it, except what is hidden; paths are in the order of their names from `root` on."""

    root: Path
    files: tuple[Path, ...]
    skipped: tuple[Path, ...]
    """Of another ending, of a format that is switched off, or without an ending and no image."""
    damaged: Mapping[Path, str]
    """Files with the ending of an image that are none, or cannot be read, and what is wrong with each."""
    without_images: tuple[Path, ...]
    """Folders with no image in them or below them."""

    def skipped_below(self, folder: Path) -> list[Path]:
        """Those of the skipped files."""
        return [path for path in self.skipped if folder in path.parents]

    def seen(self) -> str:
        """On one line: how many images, by ending, in which folders, and what is skipped."""
        folders = sorted({path.parent.relative_to(self.root).as_posix() for path in self.files} - {"."})
        places = f" in {len(folders)} folders ({counted(folders)})" if folders else ""
        found = f"{len(self.files)} images{places}: {by_ending(self.files)}"
        if self.skipped:
            found += f"; {len(self.skipped)} other files are skipped: {by_ending(self.skipped)}"
        return found


def image_folder(root: Path, formats: Collection[FormatName], key: str) -> ImageFolder:
    """Look at every file of a folder and below it; links to folders are followed, but not around in circles.

    Raises:
        ConfigError: there is no such folder, or one cannot be listed; the text starts with `key`.
    """
    if not root.is_dir():
        raise ConfigError(f"{key}: there is no folder {root}")
    try:
        listed = dict(_folders(root, frozenset()))
    except OSError as error:
        raise ConfigError(f"{key}: cannot list {error.filename}: {error.strerror}") from error
    paths = sorted((path for files in listed.values() for path in files), key=lambda path: _name(path, root))
    files: list[Path] = []
    skipped: list[Path] = []
    damaged: dict[Path, str] = {}
    for path in paths:
        try:
            (files if _is_image(path, formats) else skipped).append(path)
        except (OSError, ValueError) as error:
            damaged[path] = str(getattr(error, "strerror", None) or error)
    filled = {parent for path in files for parent in path.parents}
    without = sorted(listed.keys() - filled - {root}, key=lambda path: _name(path, root))
    return ImageFolder(root, tuple(files), tuple(skipped), damaged, tuple(without))


def by_ending(paths: Iterable[Path]) -> str:
    """How many there are of each ending, the most first."""
    counted = Counter(path.suffix.lower() or "without an ending" for path in paths)
    ordered = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number} {ending}" for ending, number in ordered)


def counted(items: Collection[str], between: str = ", ") -> str:
    """The first of them, and how many more there are."""
    more = len(items) - SHOWN
    return between.join(list(items)[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _folders(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[tuple[Path, list[Path]]]:
    """Each folder with the files in it. Raises `OSError`."""
    status = folder.stat()
    own = status.st_dev, status.st_ino
    if own in above:  # a link to a folder in which it lies
        return
    visible = [path for path in folder.iterdir() if not path.name.startswith(".") and path.name != LEFT_BEHIND]
    folders = {path for path in visible if path.is_dir()}
    yield folder, [path for path in visible if path not in folders]
    for path in folders:
        yield from _folders(path, above | {own})


def _is_image(path: Path, formats: Collection[FormatName]) -> bool:
    """Whether a file is read as an image. Raises `ValueError` or `OSError` if only its name is that of one."""
    ending = path.suffix.lower()
    if ending not in ENDINGS and (ending or not path.is_file()):
        return False
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no regular file")
    with path.open("rb") as stream:
        head = stream.read(HEAD)
    found = recognised(head)
    if found is None and ending:
        raise ValueError("it begins like no image" if head else "it is empty")
    return found is not None and found.name in formats
