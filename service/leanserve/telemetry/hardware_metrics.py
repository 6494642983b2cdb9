"""What the machine does: CPUs, memory, energy, and the GPUs that NVML shows; read when Prometheus scrapes.

What cannot be read is absent, never zero: a zero would be taken for a measurement. CPUs count their energy in RAPL
(`/sys/class/powercap`, often readable by root alone), GPUs in NVML (the package `nvidia-ml-py`, extra `gpu`). The names
under which Triton reports the same stand beside ours.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import Metric

from leanserve.telemetry.nvml import NvmlGpu, gpus_of
from leanserve.telemetry.observations import VariantMetrics

PACKAGE = re.compile(r"intel-rapl:\d+$")
"""A whole processor; `intel-rapl:0:0` would be a part of it, and counted twice."""


@dataclass(frozen=True)
class Sources:
    """Where the readings come from. `nvml` is the module `pynvml`, initialised; `None`: there is no GPU to see."""

    proc: Path = Path("/proc")
    powercap: Path = Path("/sys/class/powercap")
    nvml: Any = None
    cuda_visible: str | None = None
    """The environment's `CUDA_VISIBLE_DEVICES`."""
    clock: Callable[[], float] = time.monotonic


class HardwareMetrics:
    """The families of the machine, and the energy of its devices shared out among the variants that used them."""

    def __init__(self, sources: Sources, threads: int | None = None) -> None:
        """`threads` is the budget of the service."""
        self._threads = threads
        self._host = _Host(sources.proc)
        self._processors = _Processors(sources.powercap)
        self._gpus = gpus_of(sources.nvml, sources.cuda_visible)
        self._shares = _EnergyShares(sources.clock)
        self.joules: dict[str, float] = {}
        """By variant, as of the last reading."""

    def collect(self, model: str, variants: Iterable[VariantMetrics]) -> Iterator[Metric]:
        """All families, from readings taken now."""
        if self._threads is not None:
            yield single_gauge("leanserve_cpu_threads", "CPU threads that the service may use.", self._threads)
        yield from self._host.collect()
        joules = self._processors.joules()
        if joules is not None:
            yield _counter("leanserve_cpu_energy_joules", "Energy of all CPU packages since the start.", joules)
        yield from _gpu_families(self._gpus)
        yield from self._energy_of(model, variants, joules)

    def _energy_of(self, model: str, variants: Iterable[VariantMetrics], cpu: float | None) -> Iterator[Metric]:
        joules = {"cpu": cpu} | {name: gpu.joules() for gpu in self._gpus for name in gpu.names}
        known = {device: spent for device, spent in joules.items() if spent is not None}
        served = list(variants)
        for device in {item.facts.device for item in served if "," in item.facts.device}:
            if known.keys() >= set(device.split(",")):  # replicas on several GPUs, in turns
                known[device] = sum(known[name] for name in device.split(","))
        used = self._shares.update(known, [item for item in served if item.facts.device in known])
        self.joules = {name: spent for (name, _), spent in used.items()}
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
        yield single_gauge("nv_cpu_utilization", "Busy share (0-1) of all CPUs since the last scrape.", self.share)
        fields = (line.split() for line in (self.proc / "meminfo").read_text().splitlines())
        kibibytes = {name: int(value) for name, value, *_ in fields}
        used = kibibytes["MemTotal:"] - kibibytes["MemAvailable:"]
        yield single_gauge("nv_cpu_memory_used_bytes", "Memory in use.", used * 1024)
        yield single_gauge("nv_cpu_memory_total_bytes", "Memory there is.", kibibytes["MemTotal:"] * 1024)

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


def _gpu_families(gpus: list[NvmlGpu]) -> Iterator[Metric]:
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


def single_gauge(name: str, text: str, value: float) -> Metric:
    """A gauge of one sample without labels."""
    metric = Metric(name, text, "gauge")
    metric.add_sample(name, {}, value)
    return metric


def _counter(name: str, text: str, value: float) -> Metric:
    metric = Metric(name, text, "counter")
    metric.add_sample(f"{name}_total", {}, value)
    return metric
