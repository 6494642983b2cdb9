"""onnxruntime on a GPU: providers and their options, inputs that stay bound; the latter in the host's memory, too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from pydantic import TypeAdapter

from leanserve.contracts import ModelSpec, OnnxModel, TensorSpec
from leanserve.errors import DeviceLost
from leanserve.hardware import Gpu, Hardware
from leanserve.passes import AnyPass
from leanserve.runtime.backends import onnx_binding
from leanserve.runtime.backends.engine_cache import SUMS, EngineCache
from leanserve.runtime.backends.onnx_binding import BoundSession
from leanserve.runtime.backends.onnx_providers import provider_choice
from leanserve.runtime.backends.onnx_runtime import OnnxRuntimeBackend
from leanserve.runtime.formats.onnx_session import onnx_session

SPEC = ModelSpec((TensorSpec("x", "float32", (None, 3)),), (TensorSpec("y", "float32", (None, 3)),))
ON_GPU = Hardware("Xeon", 2, (), (Gpu("NVIDIA H200", 2**37),), ("cuda:0",))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """y = 2 x, for any number of rows of any length."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", "length", 3]) for name in "xy"]
    two = onnx.numpy_helper.from_array(np.array(2, np.float32), "two")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "two"], ["y"])], "twice", ends[:1], ends[1:], [two])
    target = tmp_path_factory.mktemp("graph") / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), target)
    return target


@pytest.mark.parametrize(
    ("provider", "device", "choice"),
    [
        (None, "cpu", ("cpu", "cpu")),
        ("auto", "cpu", ("cpu", "cpu")),
        ("auto", "cuda:1", ("cuda", "cuda:1")),
        ("cpu", "cuda:1", ("cpu", "cpu")),
        ("cuda", "cuda:1", ("cuda", "cuda:1")),
        ("tensorrt", "cuda:0", ("tensorrt", "cuda:0")),
    ],
)
def test_the_pass_decides_and_else_the_device(provider: str | None, device: str, choice: tuple[str, str]) -> None:
    assert provider_choice({} if provider is None else {"provider": provider}, device) == choice


def test_each_provider_has_those_after_it_for_what_it_cannot(tmp_path: Path) -> None:
    model = OnnxModel(tmp_path / "model.onnx", SPEC)
    (trt, options), (cuda, of_cuda), cpu = provider_choice({"provider": "tensorrt"}, "cuda:1").listed(model)
    assert (trt, cuda, cpu) == ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
    assert options["device_id"] == of_cuda["device_id"] == "1"
    assert of_cuda["use_tf32"] == "0"
    assert options["trt_engine_cache_path"] == str(tmp_path / "tensorrt"), "an engine takes minutes to make"
    assert provider_choice({}, "cuda:1").listed(model) == [(cuda, of_cuda), cpu]


def test_an_engine_is_kept_nowhere_where_the_artifact_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    (_, options), *_ = provider_choice({"provider": "tensorrt"}, "cuda:0").listed(OnnxModel(tmp_path / "m", SPEC))
    assert "trt_engine_cache_path" not in options


def test_only_gpus_have_libraries_to_load_and_what_is_missed_stays_off_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("cuDNN is missing"))
    provider_choice({}, "cpu").load_libraries()
    assert capsys.readouterr() == ("", "")
    provider_choice({}, "cuda:0").load_libraries()
    assert capsys.readouterr() == ("", "cuDNN is missing\n")


def bound_on_the_host(path: Path) -> BoundSession:
    session = onnx_session(str(path), onnxruntime.SessionOptions())
    return BoundSession(session, ["x"], ["y"], "cpu")


def test_bound_inputs_are_used_again_and_answers_stay(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    real = onnxruntime.OrtValue.ortvalue_from_shape_and_type

    def counted(*given: Any) -> Any:
        made.append(given)
        return real(*given)

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", counted)
    bound, first = bound_on_the_host(path), SPEC.example(2, 4, seed=1)
    (kept,) = bound.run(first)
    for seed in (2, 3):
        batch = SPEC.example(2, 4, seed=seed)
        assert bound.run(batch)[0] == pytest.approx(2 * batch[0])
    assert kept == pytest.approx(2 * first[0])
    assert len(made) == 1
    assert bound.run(SPEC.example(3, 5))[0].shape == (3, 5, 3)
    assert len(made) == 2


def test_no_more_is_bound_than_is_planned_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_binding, "MOST_BOUND", 2)
    bound = bound_on_the_host(path)
    for length in (1, 2, 1, 3):
        bound.run(SPEC.example(1, length))
    assert [shapes[0][0][1] for shapes in bound._idle] == [1, 3], "the shape that was run longest ago is gone"
    bound.clear()
    assert not bound._idle


def test_a_spoilt_context_is_no_ordinary_failure(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = OnnxRuntimeBackend(OnnxModel(path, SPEC), 1)

    class Spoilt:
        def run(self, batch: Any) -> Any:
            raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")

    monkeypatch.setattr(backend, "_bound", Spoilt())
    with pytest.raises(DeviceLost, match="is lost to this process: CUDA failure 700"):
        backend.run(SPEC.example(1))


def test_what_is_bound_is_let_go_where_memory_lacks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, bound = OnnxRuntimeBackend(OnnxModel(path, SPEC), 1), bound_on_the_host(path)
    monkeypatch.setattr(backend, "_bound", bound)
    backend.run(SPEC.example(1))
    assert bound._idle

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 8")

    monkeypatch.setattr(bound, "_bind", out_of_memory)
    with pytest.raises(RuntimeError, match="Failed to allocate"):
        backend.run(SPEC.example(2))
    assert not bound._idle


def test_engines_are_kept_as_batches_make_them(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, engines = OnnxRuntimeBackend(OnnxModel(path, SPEC), 1), EngineCache(tmp_path / "tensorrt")
    monkeypatch.setattr(backend, "_bound", bound_on_the_host(path))
    monkeypatch.setattr(backend, "_engines", engines)
    (tmp_path / "tensorrt" / "graph.engine").write_bytes(b"for this batch")
    backend.run(SPEC.example(1))
    assert (tmp_path / "tensorrt" / SUMS).exists()


@pytest.mark.gpu
@pytest.mark.skipif("CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="needs CUDA")
def test_a_gpu_answers_as_the_cpu(path: Path) -> None:
    backend = OnnxRuntimeBackend(OnnxModel(path, SPEC), 1, "cuda:0")
    assert backend.device == "cuda:0"
    for rows in (1, 4, 1):
        batch = SPEC.example(rows, 6)
        assert backend.run(batch).outputs[0] == pytest.approx(2 * batch[0])
    backend.close()


def test_passes_say_what_does_not_run_where_it_is_served() -> None:
    def reason(options: dict[str, object], hardware: Hardware) -> str | None:
        made: AnyPass = TypeAdapter(AnyPass).validate_python(options)
        return made.unsupported_reason(hardware)

    on_cpu = Hardware("Xeon", 2, gpus=ON_GPU.gpus)
    for kind in ("quantize_static", "quantize_dynamic", "quantize_select", "qat"):
        options: dict[str, object] = {"kind": kind} | ({"max_drop": 0.01} if kind == "quantize_select" else {})
        assert "no products of 8-bit integers on GPUs" in (reason(options, ON_GPU) or "")
        assert reason(options, on_cpu) is None
    assert "aot_inductor compiles for the CPU" in (reason({"kind": "aot_inductor"}, ON_GPU) or "")
    assert reason({"kind": "aot_inductor"}, on_cpu) is None
    on_cuda: dict[str, object] = {"kind": "onnxruntime", "provider": "cuda"}
    assert reason(on_cuda, ON_GPU) is None
    assert "set device: cuda" in (reason(on_cuda, on_cpu) or "")
