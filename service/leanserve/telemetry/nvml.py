"""GPUs as NVML tells of them, by the package `nvidia-ml-py` (extra `gpu`), in base units.

NVML shows all of the machine, and numbers them by their places on the bus; what backends call `cuda:0` is the first of
those that `CUDA_VISIBLE_DEVICES` names.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

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


def gpus_of(nvml: Any, visible: str | None = None) -> list[NvmlGpu]:
    """All GPUs of the initialised module, none without it; `visible` is `CUDA_VISIBLE_DEVICES`."""
    return [NvmlGpu(nvml, index, visible) for index in range(0 if nvml is None else nvml.nvmlDeviceGetCount())]


def cuda_numbers(index: int, uuid: str, visible: str | None) -> tuple[str, ...]:
    """What backends call the GPU of this place and UUID, where `visible` is `CUDA_VISIBLE_DEVICES`; empty: nothing."""
    if visible is None:
        number = index
    else:
        named = [name.strip() for name in visible.split(",")]
        places = [place for place, name in enumerate(named) if name == str(index) or (name and uuid.startswith(name))]
        if not places:
            return ()
        number = places[0]
    return ("cuda", "cuda:0") if number == 0 else (f"cuda:{number}",)


class NvmlGpu:
    """One GPU's readings; those that it does not support are `None`."""

    def __init__(self, nvml: Any, index: int, visible: str | None = None) -> None:
        self.nvml = nvml
        self.index = index
        self.handle = nvml.nvmlDeviceGetHandleByIndex(index)
        self.uuid = _text(self.read("UUID"))
        self.names = cuda_numbers(index, self.uuid, visible)
        """What a backend calls it."""
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
