"""Files in folders that others can reach: nothing but a regular file is read, and a read-only disk is known as one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from leanserve.disk import may_write, open_regular, sha256_of


@pytest.mark.timeout(20)
def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    with open_regular(tmp_path / "file") as stream:
        assert stream.read() == b"abc"
    assert sha256_of(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
            open_regular(path)
    with pytest.raises(FileNotFoundError):
        sha256_of(tmp_path / "nothing")


def test_what_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert may_write(tmp_path)
    assert may_write(tmp_path / "new" / "folder")
    assert not may_write(tmp_path / "file")
    assert not may_write(tmp_path / "file" / "folder")
    assert not may_write(Path("/proc/sys/new"))


def test_a_folder_that_is_read_only_is_seen_also_by_root(
    tmp_path: Path, read_only: Callable[[Path], list[str]]
) -> None:
    program = "import sys, pathlib; from leanserve.disk import may_write; print(may_write(pathlib.Path(sys.argv[1])))"
    for place in (tmp_path, tmp_path / "new"):
        command = [*read_only(tmp_path), sys.executable, "-c", program, str(place)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"
