"""GPUs as NVML tells of them, by the package `nvidia-ml-py` (extra `gpu`), in base units.

A file of its own because every command asks which GPUs there are, and only a server needs metrics.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

from leanserve.hardware import Gpu

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
    gpus = gpus_of(nvml or initialised_nvml())
    return [Gpu(gpu.labels["name"], getattr(gpu.read("MemoryInfo"), "total", 0)) for gpu in gpus]


def gpus_of(nvml: Any) -> list[NvmlGpu]:
    """All GPUs of the initialised module; none without it."""
    return [NvmlGpu(nvml, index) for index in range(0 if nvml is None else nvml.nvmlDeviceGetCount())]


class NvmlGpu:
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
        """What is read, further labels of it, and its value in base units."""
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


def _text(value: str | bytes | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""
