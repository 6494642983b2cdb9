"""A GPU as the torch backend needs it: a handful of calls, so that tests can put something else in its place.

Only this file of the service calls `torch.cuda` to compute. Imported where a GPU is used, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias, TypeVar

import torch

from leanserve.errors import StartupError

_Made = TypeVar("_Made")
Stream: TypeAlias = Any
"""Of `torch.cuda`, or what a test has in its place."""

_cuda: Any = torch.cuda
"""Without torch's annotations, which are incomplete."""


class Card(Protocol):
    """One GPU."""

    @property
    def name(self) -> str:
        """`cuda:0` and so on."""

    def place(self, module: torch.nn.Module) -> torch.nn.Module:
        """Move a module there."""

    def stream(self) -> Stream:
        """A queue of work of its own."""

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        """Whatever this thread asks of the GPU in the block is queued on that stream."""

    def pinned(self, size: int) -> torch.Tensor:
        """So many bytes of the host's memory that the GPU reads and writes by itself."""

    def empty_like(self, host: torch.Tensor) -> torch.Tensor:
        """Memory of the GPU for what is in the host's."""

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Queue a copy between the two memories; the host's must be pinned."""

    def wait(self, stream: Stream) -> None:
        """Wait until all is done that was queued on this stream, and for no other; the thread sleeps meanwhile."""

    def capture(self, stream: Stream, pool: object, work: Callable[[], _Made]) -> tuple[Callable[[], None], _Made]:
        """Record what `work` queues, as a graph that one call queues again; and where it leaves its outputs.

        Graphs with the same `pool` share their memory: one runs at a time.
        """

    def pool(self) -> object:
        """Memory for graphs that are run one after the other."""

    def release(self) -> None:
        """Give back memory that is kept for later."""


class TorchCard:
    """A `Card` that is one."""

    def __init__(self, device: str) -> None:
        """Raises `StartupError` where torch cannot use it."""
        if not torch.cuda.is_available():
            raise StartupError(
                f"torch {torch.__version__} cannot use {device}: it is built for CPUs, or finds no driver; install "
                "a torch for CUDA, put the pass onnxruntime last, or set device: cpu"
            )
        self.name = device
        self._device = torch.device(device)

    def place(self, module: torch.nn.Module) -> torch.nn.Module:
        return module.to(self._device)

    def stream(self) -> Stream:
        return _cuda.Stream(self._device)

    def on(self, stream: Stream) -> AbstractContextManager[object]:
        return torch.cuda.stream(stream)

    def pinned(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def empty_like(self, host: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(host, device=self._device)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def wait(self, stream: Stream) -> None:
        event = _cuda.Event(blocking=True)
        event.record(stream)
        event.synchronize()

    def capture(self, stream: Stream, pool: Any, work: Callable[[], _Made]) -> tuple[Callable[[], None], _Made]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            made = work()
        return graph.replay, made

    def pool(self) -> object:
        return torch.cuda.graph_pool_handle()

    def release(self) -> None:
        torch.cuda.empty_cache()
