from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from leanserve.contracts import Array, Backend, Json, ModelSpec, OnnxModel, TensorSpec
from leanserve.errors import BadInput, StartupError
from leanserve.runtime.backends.onnx_runtime import AWAKE_S, BETWEEN_S, OnnxRuntimeBackend
from leanserve.runtime.linux.spin_control import spin_us
from leanserve.runtime.onnx_arena import shrink_arena

SPEC = ModelSpec(
    (TensorSpec("left", "float32", (64,)), TensorSpec("right", "float32", (64,))),
    (TensorSpec("product", "float32", (64,)), TensorSpec("sum", "float32", (64,))),
)
Result = TypeVar("Result")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """left @ W and left + right, its outputs declared in the other order than the spec has them."""
    weights = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    ends = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 64]) for name in ("left", "right")}
    outs = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 64]) for name in ("sum", "product")}
    nodes = [
        helper.make_node("MatMul", ["left", "weights"], ["product"]),
        helper.make_node("Add", ["left", "right"], ["sum"]),
    ]
    constants = [onnx.numpy_helper.from_array(weights, "weights")]
    graph = helper.make_graph(nodes, "two", list(ends.values()), list(outs.values()), constants)
    target = tmp_path_factory.mktemp("graph") / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), target)
    return target


def on_a_thread(function: Callable[[], Result]) -> Result:
    """Like the device thread: a session flushes denormals on the thread that made it, other tests must not see that."""
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_a_batch_answers_like_its_rows_alone_in_the_order_of_the_spec(path: Path) -> None:
    left, right = SPEC.example(5)

    def run() -> tuple[Backend, tuple[Array, ...], list[tuple[Array, ...]]]:
        backend: Backend = OnnxRuntimeBackend(OnnxModel(path, SPEC), threads=2)
        rows = [backend.run((left[row : row + 1], right[row : row + 1])).outputs for row in range(5)]
        return backend, backend.run((left, right)).outputs, rows

    backend, (product, total), rows = on_a_thread(run)
    assert (backend.name, backend.device, backend.row_buckets) == ("onnxruntime", "cpu", ())
    assert np.allclose(total, left + right)
    assert np.allclose(product, np.concatenate([row[0] for row in rows]), atol=1e-5)
    assert product.dtype == np.float32


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[onnxruntime.SessionOptions]:
    """The options of the sessions that are opened, but for the first two of a process, which serve all others."""
    spin_us(1)
    shrink_arena()
    seen: list[onnxruntime.SessionOptions] = []
    real = onnxruntime.InferenceSession

    def spy(source: str, options: onnxruntime.SessionOptions, providers: list[str]) -> onnxruntime.InferenceSession:
        seen.append(options)
        return real(source, options, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    return seen


LEVEL = onnxruntime.GraphOptimizationLevel


@pytest.mark.parametrize(
    ("settings", "threads", "level", "spins"),
    [
        ({}, 3, LEVEL.ORT_ENABLE_ALL, "1"),
        ({"spinning": "auto"}, 3, LEVEL.ORT_ENABLE_ALL, "1"),
        ({"threads": "auto", "optimisation": "disable", "spinning": "off"}, 3, LEVEL.ORT_DISABLE_ALL, "0"),
        ({"threads": 1, "optimisation": "basic", "spinning": "on"}, 1, LEVEL.ORT_ENABLE_BASIC, "1"),
        ({"threads": 2, "optimisation": "extended", "provider": "cpu"}, 2, LEVEL.ORT_ENABLE_EXTENDED, "1"),
    ],
)
def test_every_setting_reaches_the_session(
    path: Path,
    opened: list[onnxruntime.SessionOptions],
    settings: dict[str, Json],
    threads: int,
    level: object,
    spins: str,
) -> None:
    on_a_thread(lambda: OnnxRuntimeBackend(OnnxModel(path, SPEC, settings), threads=3))
    (options,) = opened
    assert options.intra_op_num_threads == threads
    assert options.inter_op_num_threads == 1
    assert options.graph_optimization_level == level
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == spins
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


@pytest.mark.parametrize(("settings", "spins"), [({}, "1"), ({"spinning": "auto"}, "1"), ({"spinning": "off"}, "0")])
def test_the_only_session_of_a_process_spins_unless_told_otherwise(
    path: Path, opened: list[onnxruntime.SessionOptions], settings: dict[str, Json], spins: str
) -> None:
    on_a_thread(lambda: OnnxRuntimeBackend(OnnxModel(path, SPEC, settings), threads=2, alone=True))
    assert opened[0].get_session_config_entry("session.intra_op.allow_spinning") == spins
    with pytest.raises(RuntimeError, match="force_spinning_stop"):  # is not set: its threads stay awake for a moment
        opened[0].get_session_config_entry("session.force_spinning_stop")


@pytest.mark.parametrize(("alone", "longest_s"), [(True, AWAKE_S), (False, BETWEEN_S)], ids=["alone", "in company"])
def test_threads_wait_busily_no_longer_than_measured(
    path: Path, opened: list[onnxruntime.SessionOptions], longest_s: float, *, alone: bool
) -> None:
    on_a_thread(lambda: OnnxRuntimeBackend(OnnxModel(path, SPEC), threads=2, alone=alone))
    assert opened[0].get_session_config_entry("session.intra_op.spin_duration_us") == str(spin_us(longest_s))


@pytest.mark.parametrize("alone", [False, True], ids=["in company", "alone"])
@pytest.mark.parametrize("spinning", ["off", "on", "auto"])
def test_an_idle_backend_uses_no_cpu(path: Path, spinning: str, *, alone: bool) -> None:
    batch = SPEC.example(4096)

    def run() -> OnnxRuntimeBackend:
        backend = OnnxRuntimeBackend(OnnxModel(path, SPEC, {"spinning": spinning}), threads=3, alone=alone)
        backend.run(batch)
        return backend

    backend = on_a_thread(run)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.04, "onnxruntime's own default spins for longer"
    backend.close()


FLUSHING = """
import sys, threading
from pathlib import Path
import numpy as np
from leanserve.runtime.backends.onnx_runtime import OnnxRuntimeBackend
from leanserve.contracts import TensorSpec
from leanserve.contracts import ModelSpec
from leanserve.contracts import OnnxModel

fields = tuple(TensorSpec(name, "float32", (64,)) for name in ("left", "right", "product", "sum"))
model = OnnxModel(Path(sys.argv[1]), ModelSpec(fields[:2], fields[2:]))
tiny = np.full((1, 64), 1e-39, np.float32)
for _ in range(2):
    lane = threading.Thread(target=lambda: print(OnnxRuntimeBackend(model, 1).run((tiny, tiny)).outputs[1].max()))
    lane.start()
    lane.join()
"""


def test_denormals_are_flushed_on_every_lane(path: Path) -> None:
    """In a process of its own: onnxruntime sets the calling thread at the first session of a process only."""
    run = [sys.executable, "-c", FLUSHING, str(path)]
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout == "0.0\n0.0\n"


def threads_settle_at(expected: int) -> bool:
    """Whether the process soon has so many threads: the kernel forgets ended ones a little later."""
    until = time.monotonic() + 5
    while len(list(Path("/proc/self/task").iterdir())) != expected and time.monotonic() < until:
        time.sleep(0.02)
    return time.monotonic() < until


def test_closing_ends_the_threads(path: Path) -> None:
    time.sleep(0.2)
    before = len(list(Path("/proc/self/task").iterdir()))
    backend = on_a_thread(lambda: OnnxRuntimeBackend(OnnxModel(path, SPEC), threads=4))
    assert threads_settle_at(before + 3), "the calling thread is the fourth"
    backend.close()
    assert threads_settle_at(before)


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this machine has CUDA")
def test_a_provider_that_is_not_there_is_an_error_and_not_a_silent_cpu(path: Path) -> None:
    with pytest.raises(StartupError, match=r"cannot use CUDAExecutionProvider .* install the extra 'gpu'"):
        OnnxRuntimeBackend(OnnxModel(path, SPEC, {"provider": "cuda"}), threads=1)


def test_a_provider_that_does_not_start_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library has CUDA but the driver fails: onnxruntime then opens the session on the CPU without a word."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda source, options, providers: real(source, options, providers=["CPUExecutionProvider"]),
    )

    def refused() -> str:
        with pytest.raises(StartupError) as caught:
            OnnxRuntimeBackend(OnnxModel(path, SPEC, {"provider": "cuda"}), threads=1)
        return str(caught.value)

    assert "active: CPUExecutionProvider" in on_a_thread(refused)


def test_a_value_that_points_beyond_a_table_is_the_clients_fault(tmp_path: Path) -> None:
    spec = ModelSpec((TensorSpec("ids", "int64", (2,)),), (TensorSpec("rows", "float32", (2, 3)),))
    table = onnx.numpy_helper.from_array(np.ones((5, 3), np.float32), "table")
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["rows", 2])
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["rows", 2, 3])
    graph = helper.make_graph([helper.make_node("Gather", ["table", "ids"], ["rows"])], "look", [ids], [rows], [table])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "model.onnx"
    )

    def run() -> None:
        backend = OnnxRuntimeBackend(OnnxModel(tmp_path / "model.onnx", spec), threads=1)
        backend.run((np.array([[0, 4]]),))
        with pytest.raises(BadInput, match=r"idx=5 must be within the inclusive range \[-5,4\]"):
            backend.run((np.array([[0, 4], [5, 1]]),))
        with pytest.raises(Exception, match="Got invalid dimensions") as other:
            backend.run((np.array([[0, 4, 1]]),))
        assert not isinstance(other.value, BadInput)

    on_a_thread(run)
