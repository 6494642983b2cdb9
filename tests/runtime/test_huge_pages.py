"""Memory is gathered into huge pages: where a backend took much of it, and only what is in use anyway."""

from __future__ import annotations

import mmap
import platform
import re
from pathlib import Path

import pytest

from leanserve.contracts import Arrays, Result
from leanserve.runtime.device import Device
from leanserve.runtime.linux import huge_pages
from leanserve.runtime.linux.huge_pages import anonymous_bytes, gather_since
from leanserve.runtime.unused_memory import give_back
from leanserve.runtime.warm_up import warm_up
from scripted import SPEC, ScriptedBackend

MANY = 64 << 20


def gathers() -> bool:
    """Whether this system has huge pages that can be asked for (Linux 6.1)."""
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    known = release is not None and (int(release[1]), int(release[2])) >= (6, 1)
    return known and Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").exists()


pytestmark = pytest.mark.skipif(not gathers(), reason="no huge pages, or Linux before 6.1")


def in_huge_pages() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return next(int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("AnonHugePages:"))


def private(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def test_what_was_taken_is_gathered_and_stays_what_it_was() -> None:
    before, huge = anonymous_bytes(), in_huge_pages()
    with private(MANY) as memory:
        memory[:] = bytes(range(256)) * (MANY // 256)
        assert gather_since(before) >= MANY // 2
        assert in_huge_pages() - huge >= MANY // 2
        assert memory[:] == bytes(range(256)) * (MANY // 256)


def test_places_with_holes_are_left_alone() -> None:
    before = anonymous_bytes()
    with private(2 * MANY) as memory:
        for start in range(0, 2 * MANY, 2 * mmap.PAGESIZE):
            memory[start] = 1
        sparse = anonymous_bytes()
        gather_since(before)
        assert anonymous_bytes() - sparse < MANY / 16


def test_little_is_not_worth_it() -> None:
    before, huge = anonymous_bytes(), in_huge_pages()
    with private(huge_pages.WORTH // 2) as memory:
        memory[:] = b"x" * len(memory)
        assert gather_since(before) == 0
        assert in_huge_pages() <= huge


@pytest.mark.parametrize("missing", ["_SIZE", "_PROCESS"])
def test_systems_without_are_no_worse(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huge_pages, missing, tmp_path / "none")
    with private(MANY) as memory:
        memory[:] = b"x" * MANY
        assert gather_since(-MANY) == 0


def test_a_large_backend_is_in_huge_pages_when_it_is_warm() -> None:
    class Large(ScriptedBackend):
        def __init__(self) -> None:
            super().__init__()
            self.weights = private(MANY)
            self.weights[:] = b"x" * MANY

        def run(self, batch: Arrays) -> Result:
            return Result(batch)

    give_back()  # warming up ends with it, and what other tests have left in huge pages would go then
    huge = in_huge_pages()
    device = Device("test", 1)
    try:
        running = warm_up(device, lambda _: Large(), SPEC, 1)
        assert in_huge_pages() - huge >= MANY // 2
        assert running.costs.tables[0].knee == 1
    finally:
        device.close()
