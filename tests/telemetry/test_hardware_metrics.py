"""What the machine tells is exported in the right units, absent where it cannot be read, and shared out by use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.samples import Sample

from fake_hardware import FakeNvml, busy_gpu, processor
from leanserve.telemetry.hardware_metrics import Sources
from leanserve.telemetry.metrics import Metrics
from leanserve.telemetry.nvml import cuda_numbers, initialised_nvml
from leanserve.telemetry.observations import VariantFacts

NOWHERE = Path("/nonexistent")


def samples(made: Metrics) -> list[Sample]:
    return [item for family in parse_text(made.render()[0].decode()) for item in family.samples]


def value(found: list[Sample], name: str, /, **labels: str) -> float:
    (match,) = [item for item in found if item.name == name and labels.items() <= item.labels.items()]
    return match.value


def gpu_metrics(*gpus: dict[str, Any], clock: list[float] | None = None) -> Metrics:
    now = clock or [0.0]
    return Metrics("digits", Sources(NOWHERE, NOWHERE, FakeNvml(*gpus), clock=lambda: now[0]))


def test_a_gpu_is_exported_in_base_units() -> None:
    gpu = busy_gpu()
    made = gpu_metrics(gpu)
    gpu["TotalEnergyConsumption"] += 2_500
    found = samples(made)
    own = {"gpu": "0", "name": "NVIDIA H200", "uuid": "GPU-1"}
    assert value(found, "leanserve_gpu_utilization_ratio", **own) == 0.75
    assert value(found, "leanserve_gpu_memory_used_bytes", **own) == 5 * 2**30
    assert value(found, "leanserve_gpu_memory_bytes", **own) == 140 * 2**30
    assert value(found, "leanserve_gpu_power_watts", **own) == 350
    assert value(found, "leanserve_gpu_power_limit_watts", **own) == 700
    assert value(found, "leanserve_gpu_energy_joules_total", **own) == 2.5
    assert value(found, "leanserve_gpu_temperature_celsius", **own) == 61
    assert value(found, "leanserve_gpu_clock_hertz", clock="sm") == 1.98e9
    assert value(found, "leanserve_gpu_clock_hertz", clock="memory") == 3.201e9
    throttled = {s.labels["reason"] for s in found if s.name == "leanserve_gpu_throttled" and s.value}
    assert throttled == {"power_cap", "hardware_thermal"}


def test_triton_has_its_own_names_for_a_gpu() -> None:
    found = samples(gpu_metrics(busy_gpu()))
    triton = {item.name: item.value for item in found if item.labels == {"gpu_uuid": "GPU-1"}}
    assert triton == {
        "nv_gpu_utilization": 0.75,
        "nv_gpu_memory_used_bytes": 5 * 2**30,
        "nv_gpu_memory_total_bytes": 140 * 2**30,
        "nv_gpu_power_usage": 350,
        "nv_gpu_power_limit": 700,
        "nv_energy_consumption": 0,
    }


def test_what_a_gpu_does_not_support_is_absent() -> None:
    gpu = {key: busy_gpu()[key] for key in ("UUID", "Name", "MemoryInfo")}
    names = {item.name for item in samples(gpu_metrics(gpu)) if "gpu" in item.name or "energy" in item.name}
    assert names == {
        "leanserve_gpu_memory_used_bytes",
        "leanserve_gpu_memory_bytes",
        "nv_gpu_memory_used_bytes",
        "nv_gpu_memory_total_bytes",
    }


def test_older_drivers_name_the_reasons_of_slow_clocks_otherwise() -> None:
    gpu = busy_gpu()
    gpu["CurrentClocksThrottleReasons"] = gpu.pop("CurrentClocksEventReasons")
    assert value(samples(gpu_metrics(gpu)), "leanserve_gpu_throttled", reason="power_cap") == 1


def test_every_gpu_has_samples_of_its_own() -> None:
    second = busy_gpu() | {"UUID": "GPU-2", "PowerUsage": 100_000}
    found = samples(gpu_metrics(busy_gpu(), second))
    assert value(found, "leanserve_gpu_power_watts", gpu="0") == 350
    assert value(found, "leanserve_gpu_power_watts", gpu="1") == 100


def test_variants_are_given_the_energy_of_their_device_by_the_lane_time_they_had() -> None:
    gpu, clock = busy_gpu(), [100.0]
    made = gpu_metrics(gpu, clock=clock)
    one = made.add("one", VariantFacts(device="cuda", lanes=2))
    two = made.add("two", VariantFacts(device="cuda:0", lanes=2))
    made.add("elsewhere", VariantFacts(device="cpu", lanes=1))
    made.render()
    one.lane_s, two.lane_s = 10.0, 5.0  # of the 20 that two lanes have in ten seconds
    gpu["TotalEnergyConsumption"] += 4_000_000
    clock[0] += 10
    found = samples(made)
    name = "leanserve_device_energy_joules_total"
    assert value(found, name, version="one") == pytest.approx(2000)
    assert value(found, name, version="two") == pytest.approx(1000)
    assert not [item for item in found if item.labels.get("version") == "elsewhere" and item.name == name]
    gpu["TotalEnergyConsumption"] += 1_000_000
    clock[0] += 10
    assert value(samples(made), name, version="one") == pytest.approx(2000), "what is spent idle belongs to nobody"


def test_a_batch_that_began_before_the_last_reading_gets_no_more_than_there_was() -> None:
    gpu, clock = busy_gpu(), [0.0]
    made = gpu_metrics(gpu, clock=clock)
    made.add("one", VariantFacts(device="cuda", lanes=1)).lane_s = 30.0
    gpu["TotalEnergyConsumption"] += 1_000
    clock[0] += 10
    assert value(samples(made), "leanserve_device_energy_joules_total", version="one") == pytest.approx(1)


def test_the_energy_of_processors_is_counted_over_the_end_of_their_counters(tmp_path: Path) -> None:
    powercap, clock = processor(tmp_path, microjoules=900, wraps_at=999), [0.0]
    made = Metrics("digits", Sources(NOWHERE, powercap, clock=lambda: clock[0]))
    served = made.add("int8", VariantFacts(device="cpu", lanes=1))
    (powercap / "intel-rapl:0/energy_uj").write_text("100\n")  # 200 further on
    served.lane_s, clock[0] = 1.0, 4.0
    found = samples(made)
    assert value(found, "leanserve_cpu_energy_joules_total") == pytest.approx(200e-6)
    assert value(found, "leanserve_device_energy_joules_total", version="int8") == pytest.approx(50e-6)


def test_energy_is_absent_where_it_cannot_be_read(tmp_path: Path) -> None:
    powercap = processor(tmp_path)
    (powercap / "intel-rapl:0/energy_uj").unlink()
    made = Metrics("digits", Sources(NOWHERE, powercap))
    made.add("int8", VariantFacts(device="cpu"))
    assert not [item for item in samples(made) if "energy" in item.name]


def test_the_thread_budget_is_told_where_it_is_known() -> None:
    assert value(samples(Metrics("digits", Sources(NOWHERE, NOWHERE), threads=3)), "leanserve_cpu_threads") == 3
    assert not [s for s in samples(Metrics("digits", Sources(NOWHERE, NOWHERE))) if s.name == "leanserve_cpu_threads"]


def test_a_machine_without_gpu_or_package_has_no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert initialised_nvml() is None


@pytest.mark.parametrize(
    ("visible", "names"),
    [(None, ("cuda:1",)), ("1", ("cuda", "cuda:0")), ("0, 1", ("cuda:1",)), ("GPU-12", ("cuda", "cuda:0")), ("0", ())],
)
def test_a_gpu_is_called_by_the_number_that_cuda_gives_it(visible: str | None, names: tuple[str, ...]) -> None:
    assert cuda_numbers(1, "GPU-1234", visible) == names
