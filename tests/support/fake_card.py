"""A GPU that tests can run on: what arrives from it is not there before one has waited for the stream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Made = TypeVar("Made")


class FakeStream:
    """Copies to the host that were queued and not waited for."""

    def __init__(self) -> None:
        self.queued: list[Callable[[], None]] = []


class FakeCard:
    """A `Card` in the host's memory. Copies out are done when their stream is waited for, and not before.

    `refuses_to_record` makes graphs fail, as models that synchronise do. `events` tells what was done in which order.
    """

    def __init__(self, name: str = "cuda:0", *, refuses_to_record: bool = False) -> None:
        self.name = name
        self.refuses_to_record = refuses_to_record
        self.events: list[str] = []
        self.released = 0
        self._here = threading.local()
        self._pinned: list[torch.Tensor] = []

    @property
    def current(self) -> FakeStream | None:
        return getattr(self._here, "stream", None)

    def place(self, module: torch.nn.Module) -> torch.nn.Module:
        self.events.append("place")
        return module

    def stream(self) -> FakeStream:
        return FakeStream()

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        self._here.stream = stream
        try:
            yield
        finally:
            self._here.stream = None

    def pinned(self, size: int) -> torch.Tensor:
        self._pinned.append(torch.empty(size, dtype=torch.uint8))
        return self._pinned[-1]

    def empty_like(self, host: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(host)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        stream = self.current
        assert stream is not None, "a copy on no stream"
        pinned = [self._is_pinned(item) for item in (source, target)]
        assert any(pinned), "a copy from memory that is not pinned would block"
        if pinned[0]:
            target.copy_(source)
        else:
            taken = source.clone()
            target.fill_(7)
            stream.queued.append(lambda: (target.copy_(taken), None)[1])
        self.events.append("in" if pinned[0] else "out")

    def wait(self, stream: FakeStream) -> None:
        self.events.append("wait")
        while stream.queued:
            stream.queued.pop(0)()

    def capture(self, stream: FakeStream, pool: object, work: Callable[[], Made]) -> tuple[Callable[[], None], Made]:
        assert pool is not None
        assert stream is self.current
        if self.refuses_to_record:
            raise RuntimeError("operation not permitted when stream is capturing")
        made = work()
        self.events.append("capture")

        def replay() -> None:
            self.events.append("replay")
            for kept, fresh in zip(made, work(), strict=True):  # type: ignore[call-overload]
                kept.copy_(fresh)

        return replay, made

    def pool(self) -> object:
        return object()

    def release(self) -> None:
        self.released += 1

    def _is_pinned(self, item: torch.Tensor) -> bool:
        return any(item.untyped_storage().data_ptr() == kept.untyped_storage().data_ptr() for kept in self._pinned)
