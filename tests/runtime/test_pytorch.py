from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import nn

from leanserve.contracts import Backend, ModelSpec, TensorSpec, TorchModel
from leanserve.errors import BadInput
from leanserve.runtime.backends.pytorch import TorchBackend

SPEC = ModelSpec((TensorSpec("image", "float32", (1, 8, 8)),), (TensorSpec("logits", "float32", (3,)),))
Result = TypeVar("Result")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(576, 3),
    ]
    return nn.Sequential(*layers).eval()


def on_a_thread(function: Callable[[], Result]) -> Result:
    """Like the device thread: denormals and thread counts are set per thread."""
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_a_batch_answers_like_its_rows_alone() -> None:
    backend: Backend = TorchBackend(TorchModel(network(), SPEC), threads=2)
    batch = SPEC.example(7)
    (together,) = backend.run(batch).outputs
    alone = np.concatenate([backend.run((batch[0][row : row + 1],)).outputs[0] for row in range(7)])
    assert together.shape == (7, 3)
    assert np.allclose(together, alone, atol=1e-5)
    assert (backend.name, backend.device, backend.row_buckets) == ("pytorch", "cpu", ())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["read-only", "strided", "reversed", "big batch slice"])
def test_any_array_is_taken_without_a_warning_and_left_as_it_was(kind: str) -> None:
    backend, (batch,) = TorchBackend(TorchModel(network(), SPEC), threads=1), SPEC.example(6)
    (expected,) = backend.run((batch,)).outputs
    given = {
        "read-only": np.frombuffer(batch.tobytes(), np.float32).reshape(batch.shape),
        "strided": np.repeat(batch, 2, axis=3)[..., ::2],
        "reversed": batch[::-1].copy()[::-1],
        "big batch slice": np.concatenate([batch, batch])[:6],
    }[kind]
    (outputs,) = backend.run((given,)).outputs
    assert np.allclose(outputs, expected, atol=1e-6)
    assert np.array_equal(given, batch)


def test_inputs_and_outputs_share_memory_with_torch() -> None:
    seen: list[int] = []

    class Spy(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            seen.append(image.data_ptr())
            return image.flatten(1)[:, :3]

    backend = TorchBackend(TorchModel(Spy(), SPEC), threads=1)
    writable = SPEC.example(2)[0]
    read_only = np.frombuffer(writable.tobytes(), np.float32).reshape(writable.shape)
    for array in (writable, read_only):
        (outputs,) = backend.run((array,)).outputs
        assert seen.pop() == array.__array_interface__["data"][0]
        assert np.shares_memory(outputs, array)


def test_outputs_have_the_dtypes_of_the_spec() -> None:
    class Two(nn.Module):
        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            flat = image.flatten(1).bfloat16()
            return flat, flat.argmax(1)

    spec = ModelSpec(SPEC.inputs, (TensorSpec("flat", "float32", (64,)), TensorSpec("best", "int64", ())))
    flat, best = TorchBackend(TorchModel(Two(), spec), threads=1).run(spec.example(2)).outputs
    assert [str(array.dtype) for array in (flat, best)] == ["float32", "int64"]
    assert flat.shape == (2, 64)


def test_channels_last_weights_are_fed_channels_last_images() -> None:
    module, seen = network(), []
    module.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    spec = ModelSpec((TensorSpec("image", "float32", (3, 8, 8)),), SPEC.outputs)
    module[0] = nn.Conv2d(3, 16, 3, padding=1)  # type: ignore[operator]
    batch = spec.example(2)
    (first,) = TorchBackend(TorchModel(module, spec), threads=1).run(batch).outputs
    last_module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    (last,) = TorchBackend(TorchModel(last_module, spec), threads=1).run(batch).outputs
    assert seen == [False, True]
    assert np.allclose(first, last, atol=1e-5)


def test_threads_gradients_and_denormals_are_as_serving_wants_them() -> None:
    class Probe(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            state = [torch.get_num_threads(), torch.is_inference_mode_enabled(), (image * 1e-30).count_nonzero()]
            return torch.tensor([state], dtype=torch.float32)

    tiny = np.full((1, 1, 512, 512), 1e-12, np.float32)  # large enough for every thread of the pool

    def run() -> list[float]:
        before = torch.get_num_threads()
        try:
            backend = TorchBackend(TorchModel(Probe(), SPEC), threads=2)
            return list(backend.run((tiny,)).outputs[0][0])
        finally:
            torch.set_num_threads(before)

    assert on_a_thread(run) == [2, 1, 0], "1e-42 is denormal and must count as zero in all threads"


def test_a_closed_backend_holds_no_weights() -> None:
    backend = TorchBackend(TorchModel(network(), SPEC), threads=1)
    backend.close()
    backend.close()
    assert not list(backend._module.parameters())


class Mistaken(nn.Module):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = tuple(self.buffers())[len(ids)]
        return found


def test_a_value_that_points_beyond_a_table_is_the_clients_fault() -> None:
    spec = ModelSpec((TensorSpec("ids", "int64", (2,)),), (TensorSpec("rows", "float32", (2, 3)),))

    def run() -> None:
        backend = TorchBackend(TorchModel(nn.Embedding(5, 3), spec), threads=1)
        backend.run((np.array([[0, 4]]),))
        with pytest.raises(BadInput, match="index out of range"):
            backend.run((np.array([[0, 5]]),))
        with pytest.raises(IndexError, match="tuple index out of range"):
            TorchBackend(TorchModel(Mistaken(), spec), threads=1).run((np.array([[0, 5]]),))

    on_a_thread(run)
