"""What `device` comes to: by the GPUs that the driver shows and the engines that can use them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from leanserve.config.schema import ServiceConfig
from leanserve.context import chosen_hardware
from leanserve.errors import ConfigError, StartupError
from leanserve.hardware import Gpu, Hardware
from leanserve.runtime.cuda import driver
from leanserve.runtime.cuda.choice import chosen_devices, engines_for_cuda

CARDS = (Gpu("NVIDIA H200", 141 * 2**30), Gpu("NVIDIA L4", 24 * 2**30))
ABLE = {"torch": True, "onnxruntime": True}
HALF = {"torch": True, "onnxruntime": False}


@pytest.mark.parametrize(
    ("wanted", "gpus", "engines", "devices"),
    [
        ("auto", (), ABLE, ("cpu",)),
        ("auto", CARDS, ABLE, ("cuda:0",)),
        ("auto", CARDS, {"torch": True}, ("cuda:0",)),
        ("auto", CARDS, HALF, ("cpu",)),
        ("cpu", CARDS, ABLE, ("cpu",)),
        ("cuda", CARDS, HALF, ("cuda:0",)),
        ("cuda:1", CARDS, ABLE, ("cuda:1",)),
        (("cuda:1", "cuda:0"), CARDS, ABLE, ("cuda:1", "cuda:0")),
    ],
)
def test_what_is_chosen(wanted: Any, gpus: tuple[Gpu, ...], engines: dict[str, bool], devices: tuple[str, ...]) -> None:
    assert chosen_devices(wanted, gpus, engines) == devices


@pytest.mark.parametrize(
    ("wanted", "gpus", "engines", "told"),
    [
        ("cuda", (), {}, "there is no cuda:0: CUDA's driver shows no GPU .*; set device: cpu"),
        (
            ("cuda:0", "cuda:2"),
            CARDS,
            ABLE,
            r"no cuda:2: .* cuda:0 \(NVIDIA H200, 141 GiB\), cuda:1 \(NVIDIA L4, 24 GiB\)",
        ),
        (
            "cuda",
            CARDS,
            dict.fromkeys(ABLE, False),
            "torch and onnxruntime are built for CPUs: install the extra 'gpu'",
        ),
    ],
)
def test_what_is_not_there_is_refused(wanted: Any, gpus: tuple[Gpu, ...], engines: dict[str, bool], told: str) -> None:
    with pytest.raises(StartupError, match=told):
        chosen_devices(wanted, gpus, engines)


def test_an_engine_for_cpus_is_told_where_it_keeps_variants_off_the_gpu(caplog: pytest.LogCaptureFixture) -> None:
    chosen_devices("auto", CARDS, HALF)
    assert "but onnxruntime is built for CPUs: variants run on the CPU" in caplog.text


def test_the_config_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "visible_gpus", lambda: ())
    path = tmp_path / "mine.yaml"
    path.write_text("base: digits\ndevice: cuda:3\nvariants:\n  - name: float\n")
    config = ServiceConfig.model_validate({"base": "digits", "device": "cuda:3", "variants": [{"name": "float"}]})
    with pytest.raises(ConfigError, match=r"mine.yaml:2: device: there is no cuda:3"):
        chosen_hardware(config, path, 1)


@pytest.mark.parametrize("wrong", ["gpu", "cuda:", "cuda:01", [], ["cpu"], ["cuda:0", "cuda:0"], 0])
def test_what_is_no_device_is_no_config(wrong: Any) -> None:
    with pytest.raises(ValueError, match="device"):
        ServiceConfig.model_validate({"base": "digits", "device": wrong, "variants": [{"name": "float"}]})


def test_engines_are_looked_at_without_being_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for engine, library in (("torch", "lib/libtorch_cuda.so"), ("onnxruntime", "elsewhere.so")):
        place = tmp_path / engine / library
        place.parent.mkdir(parents=True)
        place.touch()
        (tmp_path / engine / "__init__.py").write_text("raise AssertionError('imported')")
    spec = type("Spec", (), {})

    def found(name: str) -> Any:
        made = spec()
        made.origin = str(tmp_path / name / "__init__.py")
        return made

    monkeypatch.setattr("leanserve.runtime.cuda.choice.find_spec", found)
    assert engines_for_cuda() == HALF


class FakeDriver:
    """Stands for `libcuda`: writes where it is told to, as C does."""

    def __init__(self, *gpus: Gpu, init: int = 0) -> None:
        self.gpus, self.init = gpus, init

    def __getattr__(self, name: str) -> Any:
        return {"cuInit": lambda _: self.init, "cuDeviceGetName": self._name}.get(name) or getattr(self, f"_{name}")

    def _cuDeviceGetCount(self, place: Any) -> int:  # noqa: N802
        place._obj.value = len(self.gpus)
        return 0

    def _cuDeviceGet(self, place: Any, number: int) -> int:  # noqa: N802
        place._obj.value = number
        return 0

    def _name(self, place: Any, size: int, device: ctypes.c_int) -> int:
        place.value = self.gpus[device.value].name.encode()[: size - 1]
        return 0

    def _cuDeviceTotalMem_v2(self, place: Any, device: ctypes.c_int) -> int:  # noqa: N802
        place._obj.value = self.gpus[device.value].memory_bytes
        return 0


def test_the_driver_tells_the_gpus() -> None:
    assert driver.visible_gpus(lambda _: FakeDriver(*CARDS)) == CARDS
    assert driver.visible_gpus(lambda _: FakeDriver(*CARDS, init=100)) == ()

    def missing(name: str) -> Any:
        raise OSError(name)

    assert driver.visible_gpus(missing) == ()


def test_a_machine_is_called_by_what_computes() -> None:
    on_cpu = Hardware("Xeon", 2, gpus=CARDS)
    assert (on_cpu.machine, on_cpu.on_gpu) == ("Xeon", False)
    assert Hardware("Xeon", 2, (), CARDS, ("cuda:1",)).machine == "NVIDIA L4 beside Xeon"
    both = Hardware("Xeon", 2, (), (CARDS[0], CARDS[0]), ("cuda:0", "cuda:1"))
    assert both.words == "2 x NVIDIA H200 beside Xeon with 2 threads"
