"""A GPU and a processor that tests can set: what NVML and RAPL would say of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any


class FakeNvml:
    """Stands for the module `pynvml`: its functions and constants, for GPUs of which each is a dict of readings.

    A reading that is missing raises `NVMLError`, as NVML does where a GPU does not support it.
    """

    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    class NVMLError(Exception): ...

    def __init__(self, *gpus: dict[str, Any]) -> None:
        self.gpus = gpus

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:  # noqa: N802
        return self.gpus[index]

    def __getattr__(self, name: str) -> Any:
        what = name.removeprefix("nvmlDeviceGet")
        if what == name:
            raise AttributeError(name)

        def read(gpu: dict[str, Any], kind: int | None = None) -> Any:
            if what not in gpu:
                raise self.NVMLError(what)
            return gpu[what][kind] if what == "ClockInfo" else gpu[what]

        return read


def busy_gpu() -> dict[str, Any]:
    """Everything that NVML can say of one GPU, in NVML's units: per cent, bytes, mW, mJ, degrees Celsius, MHz."""
    return {
        "UUID": "GPU-1",
        "Name": b"NVIDIA H200",
        "UtilizationRates": SimpleNamespace(gpu=75, memory=10),
        "MemoryInfo": SimpleNamespace(used=5 * 2**30, total=140 * 2**30, free=135 * 2**30),
        "PowerUsage": 350_000,
        "EnforcedPowerLimit": 700_000,
        "TotalEnergyConsumption": 1_000_000,
        "Temperature": 61,
        "ClockInfo": {1: 1980, 2: 3201},
        "CurrentClocksEventReasons": 0x4 | 0x40,
    }


def processor(folder: Path, microjoules: int = 900, wraps_at: int = 999) -> Path:
    """A folder like /sys/class/powercap with one package and a part of it, which must not be counted."""
    for name in ("intel-rapl:0", "intel-rapl:0:0"):
        (folder / name).mkdir(parents=True)
        (folder / name / "energy_uj").write_text(f"{microjoules}\n")
        (folder / name / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    (folder / "intel-rapl").mkdir()
    return folder
