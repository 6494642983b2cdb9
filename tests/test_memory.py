"""Memory that runs out: recognised in the words of every library, and stepped back from."""

from __future__ import annotations

import errno
import subprocess
import sys
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch

from leanserve.contracts import Array, Arrays
from leanserve.errors import BadInput, ConfigError
from leanserve.memory import EXIT_STATUS, exit_when_out, forget, is_out_of_memory, largest_that_fits, run_in_parts

TORCH = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
ONNXRUNTIME = (
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running MatMul node. Status Message: "
    "bfc_arena.cc:360 AllocateRawInternal Failed to allocate memory for requested buffer of size 2048000000"
)
OUT = (
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError(TORCH),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
    RuntimeError("std::bad_alloc"),
    Exception(ONNXRUNTIME),
    Exception("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Exception during initialization: bad allocation"),
    Exception("CUDA failure 2: out of memory ; GPU=0"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    torch.OutOfMemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
)
OTHERS = (
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (1x3 and 4x4)"),
    OSError(errno.ENOSPC, "No space left on device"),
    BadInput("input 'memory' is missing"),
    ValueError(),
)
LIMITED = """\
import resource
import numpy as np, onnx, onnxruntime, torch
from onnx import TensorProto, helper
from leanserve.memory import is_out_of_memory

floats = lambda name, columns: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", columns])
weight = onnx.numpy_helper.from_array(np.ones((8, 100_000), np.float32), "w")
node = helper.make_node("MatMul", ["x", "w"], ["y"])
graph = helper.make_graph([node], "g", [floats("x", 8)], [floats("y", None)], [weight])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 4
session = onnxruntime.InferenceSession(model.SerializeToString(), options)
linear = torch.nn.Linear(8, 100_000)
runs = {
    "numpy": lambda rows: np.ones((rows, 8)) @ np.ones((8, 100_000)),
    "torch": lambda rows: linear(torch.ones(rows, 8)),
    "onnxruntime": lambda rows: session.run(None, {"x": np.ones((rows, 8), np.float32)}),
}
for run in runs.values():
    run(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)
for name, run in runs.items():
    try:
        run(10_000)
    except Exception as error:
        assert is_out_of_memory(error), (name, error)
    else:
        raise SystemExit(f"{name} has memory for 4 GB")
    run(1)
"""


@pytest.mark.parametrize("error", OUT, ids=lambda error: str(error)[:40] or type(error).__name__)
def test_every_library_says_it_in_its_own_words(error: Exception) -> None:
    assert is_out_of_memory(error)
    outer = ConfigError("it does not run")
    outer.__cause__ = error
    assert is_out_of_memory(outer)


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: str(error)[:40] or type(error).__name__)
def test_other_errors_are_others(error: Exception) -> None:
    assert not is_out_of_memory(error)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_the_libraries_as_installed_are_recognised_when_they_run_out() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def model(limit: int, ran: list[int]) -> Callable[[Arrays], Array]:
    """Doubles at most so many rows."""

    def run(batch: Arrays) -> Array:
        ran.append(len(batch[0]))
        if len(batch[0]) > limit:
            raise RuntimeError(TORCH)
        return np.asarray(batch[0] * 2)

    return run


def test_rows_are_halved_until_they_fit() -> None:
    ran: list[int] = []
    run = model(10, ran)
    batch = (np.arange(32),)
    assert largest_that_fits(32, lambda rows: run((batch[0][:rows],)).sum())[0] == 8
    assert ran == [32, 16, 8]


def test_a_batch_is_run_in_parts_that_fit_in_its_order() -> None:
    ran: list[int] = []
    parts = run_in_parts(model(8, ran), (np.arange(20),))
    assert np.array_equal(np.concatenate(parts), 2 * np.arange(20))
    assert ran == [20, 10, 5, 5, 10, 5, 5]


@pytest.mark.parametrize(("error", "rows"), [(RuntimeError(TORCH), 1), (ValueError("other"), 8)])
def test_what_does_not_fit_even_alone_and_other_errors_are_raised(error: Exception, rows: int) -> None:
    ran: list[object] = []

    def fail(given: object) -> None:
        ran.append(given)
        raise error

    with pytest.raises(type(error)):
        largest_that_fits(rows, fail)
    with pytest.raises(type(error)):
        run_in_parts(fail, (np.zeros(rows),))
    assert len(ran) == 2


def test_the_arrays_of_what_failed_are_let_go_before_less_is_tried() -> None:
    seen: list[weakref.ref[Array]] = []

    def run(rows: int) -> None:
        assert all(array() is None for array in seen)
        activations = np.zeros((rows, 1000))
        seen.append(weakref.ref(activations))
        if rows > 2:
            raise MemoryError

    assert largest_that_fits(8, run)[0] == 2
    assert len(seen) == 3


def test_forgetting_reaches_what_an_error_was_raised_from() -> None:
    def inner() -> None:
        array = np.zeros(10)
        kept.append(weakref.ref(array))
        raise MemoryError

    kept: list[weakref.ref[Array]] = []
    try:
        try:
            inner()
        except MemoryError as error:
            raise ConfigError("it does not run") from error
    except ConfigError as error:
        assert kept[0]() is not None
        forget(error)
        assert kept[0]() is None


def test_a_child_ends_with_its_own_status_and_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, exit_when_out():
        raise RuntimeError(TORCH)
    assert ended.value.code == EXIT_STATUS
    assert capsys.readouterr().err.strip() == TORCH
    with pytest.raises(ValueError, match="other"), exit_when_out():
        raise ValueError("other")
