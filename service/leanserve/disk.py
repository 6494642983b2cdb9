"""What may be found where a file is expected, in folders that others can reach.

A FIFO blocks whoever opens it until somebody writes, a device may do anything when it is read, and a disk may be
read-only although every permission bit says otherwise. So files are opened here where their content is believed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from io import BufferedReader
from pathlib import Path
from types import MappingProxyType
from typing import Final

_SHOWN = 200
"""Characters of a name that are told."""
_REMEDIES: Final = MappingProxyType(
    {
        errno.ENOSPC: "make room, or put it on another disk (the cache by --cache)",
        errno.EDQUOT: "make room, or put it on another disk (the cache by --cache)",
        errno.EROFS: "choose a place that can be written (the cache by --cache)",
        errno.EACCES: "give this user the right to it, or choose another place",
        errno.EPERM: "give this user the right to it, or choose another place",
        errno.ENAMETOOLONG: "shorten it",
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
        errno.EISDIR: "name a file",
    }
)


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading; never blocks.

    Raises:
        OSError: it is missing, cannot be read, or is a folder, a FIFO or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", str(path))


def explained(error: OSError) -> str:
    """Which file, what is wrong with it, and what to do, on one line."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    where = ": ".join((*(name if len(name) <= _SHOWN else name[:_SHOWN] + " ..." for name in names), ""))
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{where}{error.strerror or error}{'' if remedy is None else f'; {remedy}'}"


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file's content. Raises OSError as `open_regular` does."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def may_write(folder: Path) -> bool:
    """Whether this process could make files in the folder, or make the folder itself where it is missing."""
    nearest = next(place for place in (folder, *folder.parents) if os.access(place, os.F_OK))
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
