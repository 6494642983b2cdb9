"""What the machine does: CPUs, memory, energy, and the GPUs that NVML shows; read when Prometheus scrapes.

What cannot be read is absent, never zero: a zero would be taken for a measurement. CPUs count their energy in RAPL
(`/sys/class/powercap`, often readable by root alone), GPUs in NVML (the package `nvidia-ml-py`, extra `gpu`). The names
under which Triton reports the same stand beside ours.
"""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import Metric

from leanserve.hardware import Gpu
from leanserve.telemetry.observations import VariantMetrics

PACKAGE = re.compile(r"intel-rapl:\d+$")
"""A whole processor; `intel-rapl:0:0` would be a part of it, and counted twice."""
THROTTLE_REASONS = {
    "idle": 0x1,
    "application_clocks": 0x2,
    "power_cap": 0x4,
    "hardware_slowdown": 0x8,
    "sync_boost": 0x10,
    "software_thermal": 0x20,
    "hardware_thermal": 0x40,
    "power_brake": 0x80,
    "display_clocks": 0x100,
}
"""Why a GPU's clocks are lower than they might be: NVML's `nvmlClocksEventReasons` bits."""


@dataclass(frozen=True)
class Sources:
    """Where the readings come from. `nvml` is the module `pynvml`, initialised; `None`: there is no GPU to see."""

    proc: Path = Path("/proc")
    powercap: Path = Path("/sys/class/powercap")
    nvml: Any = None
    clock: Callable[[], float] = time.monotonic


def initialised_nvml() -> Any:
    """The module `pynvml` after its start; `None` without the package, a driver, or a GPU."""
    if importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def visible_gpus(nvml: Any = None) -> list[Gpu]:
    """The GPUs that NVML shows, with their memory; `nvml` is the initialised module."""
    nvml = nvml or initialised_nvml()
    gpus = [_Gpu(nvml, index) for index in _indices(nvml)]
    return [Gpu(gpu.labels["name"], getattr(gpu.read("MemoryInfo"), "total", 0)) for gpu in gpus]


class HardwareMetrics:
    """The families of the machine, and the energy of its devices shared out among the variants that used them."""

    def __init__(self, sources: Sources, threads: int | None = None) -> None:
        """`threads` is the budget of the service."""
        self._threads = threads
        self._host = _Host(sources.proc)
        self._processors = _Processors(sources.powercap)
        self._gpus = [_Gpu(sources.nvml, index) for index in _indices(sources.nvml)]
        self._shares = _EnergyShares(sources.clock)

    def collect(self, model: str, variants: Iterable[VariantMetrics]) -> Iterator[Metric]:
        """All families, from readings taken now."""
        if self._threads is not None:
            yield _one("leanserve_cpu_threads", "CPU threads that the service may use.", self._threads)
        yield from self._host.collect()
        joules = self._processors.joules()
        if joules is not None:
            yield _counter("leanserve_cpu_energy_joules", "Energy of all CPU packages since the start.", joules)
        yield from _gpu_families(self._gpus)
        yield from self._energy_of(model, variants, joules)

    def _energy_of(self, model: str, variants: Iterable[VariantMetrics], cpu: float | None) -> Iterator[Metric]:
        joules = {"cpu": cpu} | {name: gpu.joules() for gpu in self._gpus for name in gpu.names}
        known = {device: spent for device, spent in joules.items() if spent is not None}
        used = self._shares.update(known, [item for item in variants if item.facts.device in known])
        if used:
            text = "Energy of the device while it ran the variant."
            metric = Metric("leanserve_device_energy_joules", text, "counter")
            for (name, device), spent in used.items():
                metric.add_sample(f"{metric.name}_total", {"model": model, "version": name, "device": device}, spent)
            yield metric


class _Host:
    """CPU and memory of the whole machine as Triton reports them; nothing where there is no /proc."""

    def __init__(self, proc: Path) -> None:
        self.proc = proc
        self.share = 0.0
        self.ticks = self._cpu_ticks()

    def collect(self) -> Iterator[Metric]:
        ticks = self._cpu_ticks()
        if ticks is None or self.ticks is None:
            return
        busy, total = ticks[0] - self.ticks[0], ticks[1] - self.ticks[1]
        if total > 0:
            self.share, self.ticks = busy / total, ticks
        yield _one("nv_cpu_utilization", "Busy share (0-1) of all CPUs since the last scrape.", self.share)
        fields = (line.split() for line in (self.proc / "meminfo").read_text().splitlines())
        kibibytes = {name: int(value) for name, value, *_ in fields}
        used = kibibytes["MemTotal:"] - kibibytes["MemAvailable:"]
        yield _one("nv_cpu_memory_used_bytes", "Memory in use.", used * 1024)
        yield _one("nv_cpu_memory_total_bytes", "Memory there is.", kibibytes["MemTotal:"] * 1024)

    def _cpu_ticks(self) -> tuple[int, int] | None:
        try:
            line = (self.proc / "stat").read_text().partition("\n")[0]
        except OSError:
            return None
        # user nice system idle iowait irq softirq steal; guest time, which follows, is already part of user.
        ticks = [int(value) for value in line.split()[1:9]]
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


class _Processors:
    """Energy of all CPU packages by RAPL, whose counters start anew at `max_energy_range_uj`."""

    def __init__(self, powercap: Path) -> None:
        self._joules = 0.0
        self._last: dict[Path, int] = {}
        self._range: dict[Path, int] = {}
        with suppress(OSError, ValueError):
            for zone in sorted(path for path in powercap.iterdir() if PACKAGE.match(path.name)):
                self._last[zone] = int((zone / "energy_uj").read_text())
                self._range[zone] = int((zone / "max_energy_range_uj").read_text())

    def joules(self) -> float | None:
        """Since the start; `None` where it cannot be read (any more)."""
        try:
            for zone, last in self._last.items():
                now = int((zone / "energy_uj").read_text())
                self._joules += (now - last) % (self._range[zone] + 1) / 1e6
                self._last[zone] = now
        except (OSError, ValueError):
            self._last = {}
        return self._joules if self._last else None


class _Gpu:
    """One GPU's readings; those that it does not support are `None`."""

    def __init__(self, nvml: Any, index: int) -> None:
        self.nvml = nvml
        self.index = index
        self.handle = nvml.nvmlDeviceGetHandleByIndex(index)
        self.names = ("cuda", "cuda:0") if index == 0 else (f"cuda:{index}",)
        """What a backend calls it."""
        self.uuid = _text(self.read("UUID"))
        self.labels = {"gpu": str(index), "name": _text(self.read("Name")), "uuid": self.uuid}
        self._first = self.read("TotalEnergyConsumption")

    def read(self, what: str, *arguments: object) -> Any:
        """What `nvmlDeviceGet<what>` says."""
        function = getattr(self.nvml, f"nvmlDeviceGet{what}", None)
        try:
            return None if function is None else function(self.handle, *arguments)
        except self.nvml.NVMLError:
            return None

    def joules(self) -> float | None:
        """Energy since the start of the service."""
        now = self.read("TotalEnergyConsumption")
        return None if now is None or self._first is None else (now - self._first) / 1e3

    def readings(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Name of a family below, labels of their own, and the value."""
        nvml = self.nvml
        use, memory = self.read("UtilizationRates"), self.read("MemoryInfo")
        watts, limit = self.read("PowerUsage"), self.read("EnforcedPowerLimit")
        values = {
            "utilization_ratio": None if use is None else use.gpu / 100,
            "memory_used_bytes": None if memory is None else memory.used,
            "memory_bytes": None if memory is None else memory.total,
            "power_watts": None if watts is None else watts / 1e3,
            "power_limit_watts": None if limit is None else limit / 1e3,
            "energy_joules": self.joules(),
            "temperature_celsius": self.read("Temperature", nvml.NVML_TEMPERATURE_GPU),
        }
        yield from ((name, {}, value) for name, value in values.items() if value is not None)
        for clock, kind in (("sm", nvml.NVML_CLOCK_SM), ("memory", nvml.NVML_CLOCK_MEM)):
            megahertz = self.read("ClockInfo", kind)
            if megahertz is not None:
                yield "clock_hertz", {"clock": clock}, megahertz * 1e6
        bits = self.read("CurrentClocksEventReasons")
        if bits is None:
            bits = self.read("CurrentClocksThrottleReasons")  # its name in older drivers
        if bits is not None:
            yield from (
                ("throttled", {"reason": name}, float(bool(bits & bit))) for name, bit in THROTTLE_REASONS.items()
            )


_GPU_TEXTS = {
    "utilization_ratio": "Share (0-1) of the time in which the GPU computed.",
    "memory_used_bytes": "Memory of the GPU in use.",
    "memory_bytes": "Memory of the GPU.",
    "power_watts": "Power that the GPU draws.",
    "power_limit_watts": "Power that the GPU may draw.",
    "energy_joules": "Energy of the GPU since the start of the service.",
    "temperature_celsius": "Temperature of the GPU.",
    "clock_hertz": "Clock rate of the GPU, by clock.",
    "throttled": "1 while the clocks are lower for this reason.",
}
_TRITON_NAMES = {
    "utilization_ratio": "nv_gpu_utilization",
    "memory_used_bytes": "nv_gpu_memory_used_bytes",
    "memory_bytes": "nv_gpu_memory_total_bytes",
    "power_watts": "nv_gpu_power_usage",
    "power_limit_watts": "nv_gpu_power_limit",
    "energy_joules": "nv_energy_consumption",
}
"""Triton's names of the same readings, in the same units."""


def _gpu_families(gpus: list[_Gpu]) -> Iterator[Metric]:
    found: dict[str, Metric] = {}
    for gpu in gpus:
        for name, labels, value in gpu.readings():
            kind = "counter" if name == "energy_joules" else "gauge"
            ours = found.setdefault(name, Metric(f"leanserve_gpu_{name}", _GPU_TEXTS[name], kind))
            ours.add_sample(ours.name + ("_total" if kind == "counter" else ""), gpu.labels | labels, value)
            if triton := _TRITON_NAMES.get(name):
                theirs = found.setdefault(triton, Metric(triton, _GPU_TEXTS[name], "unknown"))
                theirs.add_sample(triton, {"gpu_uuid": gpu.uuid}, value)
    yield from found.values()


class _EnergyShares:
    """Shares the energy of devices out among variants, by the time for which each of them had the lanes.

    Between two readings a device spends `joules` in `seconds`; a variant that had one of two lanes for half of them is
    given a quarter of the joules. What is spent idle belongs to nobody.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at = clock()
        self._joules: dict[str, float] = {}
        self._lane_s: dict[str, float] = {}
        self._spent: dict[tuple[str, str], float] = {}

    def update(self, joules: dict[str, float], variants: list[VariantMetrics]) -> dict[tuple[str, str], float]:
        """Joules by variant and device since the start, given those of every device since the start."""
        now = self._clock()
        elapsed, self._at = now - self._at, now
        for variant in variants:
            name, device = variant.name, variant.facts.device
            ran = variant.lane_s - self._lane_s.get(name, 0.0)
            self._lane_s[name] = variant.lane_s
            share = min(1.0, ran / (elapsed * variant.facts.lanes)) if elapsed > 0 else 0.0
            spent = share * (joules[device] - self._joules.get(device, 0.0))
            self._spent[name, device] = self._spent.get((name, device), 0.0) + spent
        self._joules = joules
        return self._spent


def _indices(nvml: Any) -> range:
    return range(0 if nvml is None else nvml.nvmlDeviceGetCount())


def _text(value: str | bytes | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""


def _one(name: str, text: str, value: float) -> Metric:
    metric = Metric(name, text, "gauge")
    metric.add_sample(name, {}, value)
    return metric


def _counter(name: str, text: str, value: float) -> Metric:
    metric = Metric(name, text, "counter")
    metric.add_sample(f"{name}_total", {}, value)
    return metric
