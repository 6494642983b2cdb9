"""Replicas on several GPUs: one backend to lanes, the GPU with the fewest batches takes the next."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from leanserve.contracts import Arrays, ModelSpec, OnnxModel, Result, Share
from leanserve.memory import is_out_of_memory
from leanserve.runtime import formats
from leanserve.runtime.cuda.faults import is_lost
from leanserve.runtime.cuda.replicas import Replicas

BATCH: Arrays = (np.zeros((1, 1), np.float32),)


class OnOne:
    """Runs until it is let go."""

    name = "slow"
    self_contained = True
    row_buckets = (1, 2)

    def __init__(self, device: str) -> None:
        self.device = device
        self.running = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self.closed = False

    def run(self, batch: Arrays) -> Result:
        self.running.release()
        assert self.go_on.acquire(timeout=5)
        return Result(batch, {self.device: 1.0})

    def close(self) -> None:
        self.closed = True


def test_the_gpu_with_the_fewest_batches_takes_the_next_one() -> None:
    cards = [OnOne("cuda:0"), OnOne("cuda:1")]
    both = Replicas(cards)
    assert (both.name, both.device, both.row_buckets) == ("slow", "cuda:0,cuda:1", (1, 2))
    threads = [threading.Thread(target=both.run, args=(BATCH,)) for _ in range(3)]
    for thread, card in zip(threads, (cards[0], cards[1], cards[0]), strict=True):
        thread.start()
        assert card.running.acquire(timeout=5)
    cards[1].go_on.release()
    threads[1].join()
    cards[1].go_on.release()
    assert both.run(BATCH).facts == {"cuda:1": 1.0}, "the other still runs two"
    for _ in range(2):
        cards[0].go_on.release()
    for thread in threads:
        thread.join()
    both.close()
    assert all(card.closed for card in cards)


@pytest.mark.parametrize(("on_gpu", "devices"), [(True, ["cuda:0", "cuda:1"]), (False, ["cuda:0"])])
def test_every_gpu_gets_the_model_unless_its_engine_is_for_cpus(
    monkeypatch: pytest.MonkeyPatch,
    on_gpu: bool,  # noqa: FBT001
    devices: list[str],
    tmp_path: object,
) -> None:
    opened: list[str] = []

    class Fake:
        def open(self, model: object, share: Share) -> OnOne:
            opened.append(share.device)
            return OnOne(share.device if on_gpu else "cpu")

    monkeypatch.setattr(formats, "format_named", lambda _: Fake())
    model = OnnxModel(tmp_path, ModelSpec((), ()))  # type: ignore[arg-type]
    backend = formats.open_backend(model, Share(1, ("cuda:0", "cuda:1")))
    assert opened == devices
    assert backend.device == (",".join(devices) if on_gpu else "cpu")


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: device-side assert triggered",
        "CUDA failure 700: an illegal memory access was encountered ; GPU=0",
        "cudaErrorLaunchFailure",
        "unspecified launch failure",
    ],
)
def test_what_spoils_the_context_is_recognised(text: str) -> None:
    error = ValueError("the batch failed")
    error.__cause__ = RuntimeError(text)
    assert is_lost(error)
    assert not is_out_of_memory(error)


def test_a_lack_of_memory_does_not_spoil_it() -> None:
    assert not is_lost(RuntimeError("CUDA failure 2: out of memory ; GPU=0"))
    assert is_out_of_memory(RuntimeError("CUDA failure 2: out of memory ; GPU=0"))
