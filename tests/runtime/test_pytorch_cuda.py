"""Torch's backend on a GPU: on a stand-in whose answers are there only once one has waited, and on a real one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import nn

from fake_card import FakeCard
from leanserve.contracts import Backend, ModelSpec, Result, TensorSpec, TorchModel
from leanserve.errors import DeviceLost, StartupError
from leanserve.runtime.backends.pytorch import TorchBackend
from leanserve.runtime.backends.pytorch_cuda import ROW_BUCKETS, TorchCudaBackend
from leanserve.runtime.cuda import stream_lane
from leanserve.runtime.cuda.card import Card, TorchCard
from leanserve.runtime.device import Device
from leanserve.runtime.warm_up import warm_up

SPEC = ModelSpec((TensorSpec("image", "float32", (3, 8, 8)),), (TensorSpec("values", "float32", (4,)),))
TEXT = ModelSpec((TensorSpec("ids", "int64", (None,)),), (TensorSpec("vectors", "float32", (None, 3)),))
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")


@pytest.fixture(params=["stand-in", pytest.param("real", marks=[pytest.mark.gpu, ON_GPU])])
def card(request: pytest.FixtureRequest) -> Card:
    return FakeCard() if request.param == "stand-in" else TorchCard("cuda:0")


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    """The backend sets it for the process."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    yield
    for setting, was in zip(settings, before, strict=True):
        setting.fp32_precision = was


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


def test_batches_answer_as_on_the_cpu_and_like_their_rows_alone(card: Card) -> None:
    on_cpu = TorchBackend(TorchModel(network(), SPEC), 1)
    backend: Backend = TorchCudaBackend(TorchModel(network(), SPEC), card)
    assert (backend.name, backend.device, backend.self_contained) == ("pytorch", "cuda:0", True)
    for rows in (4, 1, 4, 3):
        batch = SPEC.example(rows, seed=rows)
        (found,) = backend.run(batch).outputs
        assert found == pytest.approx(on_cpu.run(batch).outputs[0], abs=1e-5)
        alone = [backend.run((batch[0][row : row + 1],)).outputs[0][0] for row in range(rows)]
        assert found == pytest.approx(np.stack(alone), abs=1e-5)
    backend.close()


def test_answers_stay_when_the_next_batch_comes(card: Card) -> None:
    backend = TorchCudaBackend(TorchModel(network(), SPEC), card)
    (first,) = backend.run(SPEC.example(2, seed=1)).outputs
    kept = first.copy()
    backend.run(SPEC.example(2, seed=2))
    assert np.array_equal(first, kept)


def test_a_graph_is_recorded_once_for_each_bucket_and_used_from_then_on() -> None:
    card = FakeCard()
    backend = TorchCudaBackend(TorchModel(network(), SPEC), card)
    assert backend.row_buckets == ROW_BUCKETS
    for rows in (2, 2, 4, 2, 3):
        backend.run(SPEC.example(rows))
    assert card.events.count("capture") == 2
    assert card.events.count("replay") == 4, "three rows are no bucket"
    assert card.events[-3:] == ["in", "out", "wait"]


def test_idle_lanes_record_with_the_first_batch_so_that_none_does_while_it_is_timed() -> None:
    card = FakeCard()
    backend = TorchCudaBackend(TorchModel(network(), SPEC), card, lanes=3)
    backend.run(SPEC.example(2))
    assert card.events.count("capture") == 3
    together([lambda: backend.run(SPEC.example(2))] * 3)
    assert card.events.count("capture") == 3


def test_no_more_graphs_than_their_memory_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_lane, "MOST_GRAPHS", 1)
    card = FakeCard()
    backend = TorchCudaBackend(TorchModel(network(), SPEC), card)
    for rows in (1, 2, 2):
        backend.run(SPEC.example(rows))
    assert card.events.count("capture") == 1


def test_what_cannot_be_recorded_runs_kernel_by_kernel_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    backend = TorchCudaBackend(TorchModel(network(), SPEC), FakeCard(refuses_to_record=True))
    for rows in (1, 2, 4):
        assert backend.run(SPEC.example(rows)).outputs[0] == pytest.approx(
            TorchBackend(TorchModel(network(), SPEC), 1).run(SPEC.example(rows)).outputs[0], abs=1e-5
        )
    assert caplog.text.count("no CUDA graph on cuda:0, kernels are started one by one: operation not permitted") == 1


def test_rows_of_any_length_have_no_graphs(card: Card) -> None:
    backend = TorchCudaBackend(TorchModel(nn.Embedding(5, 3), TEXT), card)
    assert backend.row_buckets == ()
    for length in (3, 5, 2):
        assert backend.run((np.ones((2, length), np.int64),)).outputs[0].shape == (2, length, 3)
    if isinstance(card, FakeCard):
        assert "capture" not in card.events


class Waiting(nn.Module):
    """Ends when as many are in it as it waits for."""

    def __init__(self, together: int) -> None:
        super().__init__()
        self.barrier = threading.Barrier(together, timeout=5)
        self.streams: list[object] = []

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.barrier.wait()
        return torch.zeros((*ids.shape, 3))


def test_lanes_run_at_once_each_on_its_stream() -> None:
    card, module = FakeCard(), Waiting(2)
    streams: list[object] = []
    module.register_forward_hook(lambda *_: streams.append(card.current))
    backend = TorchCudaBackend(TorchModel(module, TEXT), card, lanes=2)
    together([lambda: backend.run((np.ones((1, 2), np.int64),))] * 2)
    assert len(set(streams)) == 2
    assert None not in streams


def together(work: list[Callable[[], Result]]) -> None:
    threads = [threading.Thread(target=item) for item in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_warm_up_records_every_bucket_on_every_lane_and_weights_are_there_once() -> None:
    card, device = FakeCard(), Device("cuda:0", 2, 2)
    try:
        load = lambda _: TorchCudaBackend(TorchModel(network(), SPEC), card, lanes=2)  # noqa: E731
        running = warm_up(device, load, SPEC, 6)
        assert running.backends[0] is running.backends[1]
        assert running.wide is None, "every lane has the whole GPU"
        assert running.costs.tables[0].buckets == (1, 2, 4)
        recorded = card.events.count("capture")
        device.call_on_each(lambda lane: running.backends[lane.index].run(SPEC.example(4)))
        assert card.events.count("capture") == recorded == 6, "three buckets on two lanes"
        assert card.events.count("place") == 1
    finally:
        device.close()


class Failing(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error: Exception | None = error

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return torch.zeros((*ids.shape, 3))


def test_memory_is_given_back_before_its_lack_is_told_and_the_next_batch_runs() -> None:
    card, module = FakeCard(), Failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"))
    backend = TorchCudaBackend(TorchModel(module, TEXT), card)
    with pytest.raises(torch.OutOfMemoryError):
        backend.run((np.ones((2, 2), np.int64),))
    assert card.released == 1
    module.error = None
    assert backend.run((np.ones((2, 2), np.int64),)).outputs[0].shape == (2, 2, 3)


def test_a_spoilt_context_is_no_ordinary_failure() -> None:
    module = Failing(RuntimeError("CUDA error: an illegal memory access was encountered"))
    backend = TorchCudaBackend(TorchModel(module, TEXT), FakeCard())
    with pytest.raises(DeviceLost, match="cuda:0 is lost to this process: CUDA error: an illegal"):
        backend.run((np.ones((2, 2), np.int64),))


@pytest.mark.parametrize(("dtype", "last"), [(torch.bfloat16, True), (torch.float32, False)])
def test_convolutions_in_16_bits_get_channels_last(dtype: torch.dtype, last: bool) -> None:  # noqa: FBT001
    seen: list[bool] = []
    convolution = nn.Conv2d(3, 4, 3).to(dtype)

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = convolution

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            seen.append(image.is_contiguous(memory_format=torch.channels_last))
            made: torch.Tensor = self.convolution(image.to(dtype)).float().mean((2, 3))
            return made

    TorchCudaBackend(TorchModel(Cast(), SPEC), FakeCard()).run(SPEC.example(2))
    assert set(seen) == {last}
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last) is last


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_torch_for_cpus_is_told() -> None:
    with pytest.raises(StartupError, match=r"torch .* cannot use cuda:0: .* put the pass onnxruntime last, or set"):
        TorchCard("cuda:0")
