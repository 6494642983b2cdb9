"""What this machine can do: instruction sets, the number of threads that may really be used, GPUs, installed libraries.

`Hardware` is the one value that is handed down: the composition root makes it once, and keys, manifests and passes ask
it instead of the machine.

Containers limit CPUs by cgroup quota and by affinity; `os.cpu_count` knows neither, and a pool of too many threads is
slower than one of the right size.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

INTERESTING_FLAGS = frozenset(
    {"avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"}
    | {"asimd", "asimddp", "asimdhp", "bf16", "i8mm"}
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that this process may use: its name, and its memory in bytes."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Hardware:
    """What variants are built for and run on."""

    cpu: str
    """The processor's model name."""
    threads: int
    """CPU threads in the budget of the service."""
    isa: tuple[str, ...] = ()
    """Instruction sets that decide which compressions pay, sorted."""
    gpus: tuple[Gpu, ...] = ()
    """Those that this process may use, by their CUDA numbers."""
    devices: tuple[str, ...] = ("cpu",)
    """What variants run on: `cpu`, or one or more of `cuda:0`, `cuda:1` ..."""

    @property
    def on_gpu(self) -> bool:
        """Whether variants run on GPUs."""
        return self.devices != ("cpu",)

    @property
    def machine(self) -> str:
        """What variants run on, by name: measurements are of it, and compared only with others of it."""
        if not self.on_gpu:
            return self.cpu
        names = [self.gpus[int(device.partition(":")[2])].name for device in self.devices]
        several = f"{len(names)} x " if len(names) > 1 else ""
        return f"{several}{' and '.join(dict.fromkeys(names))} beside {self.cpu}"

    @property
    def words(self) -> str:
        """Processor or GPU, and threads, as reports and warnings name a machine."""
        return f"{self.machine} with {self.threads} thread{'s' if self.threads > 1 else ''}"


def this_hardware(threads: int | None = None, gpus: Sequence[Gpu] = (), devices: Sequence[str] = ("cpu",)) -> Hardware:
    """This machine, with so many threads of it; all that may be used by default."""
    budget = thread_budget() if threads is None else threads
    return Hardware(cpu_name(), budget, tuple(sorted(isa_flags())), tuple(gpus), tuple(devices))


@cache
def isa_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The instruction-set flags that decide which compressions pay on this CPU (empty where unknown)."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return INTERESTING_FLAGS & frozenset(value.split())
    return frozenset()


@cache
def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model name, or the architecture where it is not told."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


@cache
def library_version(name: str) -> str | None:
    """The installed version of a distribution, or of its build for GPUs (`onnxruntime-gpu`); `None` without either."""
    for distribution in (name, f"{name}-gpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def thread_budget(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Threads that this process may use: the smaller of its affinity mask and its cgroup CPU quota, at least 1."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable, _quota(cgroup) or usable))


def _quota(cgroup: Path) -> int | None:
    """CPU quota of cgroup v2 (`cpu.max`) or v1, rounded up; `None` without a limit."""
    try:
        limit, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if limit in {"max", "-1"}:
        return None
    return math.ceil(int(limit) / int(period))
