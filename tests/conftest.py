"""Fixtures for all tests."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from leanserve.privacy import send_nothing

send_nothing()
os.environ.setdefault("LEANSERVE_MEASURE_SECONDS", "0")  # how fast variants are is of no account in tests

LONGEST = (
    "test_end_to_end",
    "test_init_config",
    "test_example",
    "test_zoo",
    "test_start",
    "test_loadtest",
    "test_onnx_service",
    "test_poison",
    "test_toy_format",
    "deploy",
)
"""What files begin with that take a process tens of seconds, or the folder they are in."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, or the last process works alone for a minute."""
    items.sort(key=lambda item: not (item.path.name.startswith(LONGEST) or item.path.parent.name in LONGEST))


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a file of tests draws while it is imported depends on no file before it."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def same_draws_for_a_file() -> None:
    """What fixtures of a file draw depends on no file before it, of which each process has others."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """What a test draws depends on no test before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def kept_from_the_collector() -> None:
    """Every variant that is opened collects garbage; it need not look through all that tests have imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def translations_are_read_once() -> None:
    """Every export makes the same table of a thousand operators anew, for 0.6 s; no pass adds any to it."""
    exporter = sys.modules.get("torch.onnx._internal.exporter._registration")
    if exporter is not None and not hasattr(exporter.ONNXRegistry.from_torchlib, "cache_info"):
        exporter.ONNXRegistry.from_torchlib = staticmethod(cache(exporter.ONNXRegistry.from_torchlib))


@pytest.fixture(autouse=True)
def denormals() -> Iterator[None]:
    """Backends flush denormals on the thread that creates them; in a test that may be the one of all later tests."""
    yield
    if sys.float_info.min / 2 == 0:
        torch.set_flush_denormal(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread: sums have one order, and tiny models are faster than with a pool."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


MOUNTED = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], list[str]]]:
    """Gives what stands before a command that cannot write a folder. Bits bind all but root, mounts bind root."""
    closed: list[tuple[Path, int]] = []

    def command(folder: Path) -> list[str]:
        if os.geteuid() == 0:
            prefix = ["unshare", "-m", "sh", "-c", MOUNTED, str(folder)]
            if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode != 0:
                pytest.skip("root cannot mount anything here")
            return prefix
        closed.extend((path, path.stat().st_mode) for path in (folder, *folder.rglob("*")))
        for path, mode in closed:
            path.chmod(mode & 0o555)
        return []

    yield command
    for path, mode in closed:
        path.chmod(mode)
