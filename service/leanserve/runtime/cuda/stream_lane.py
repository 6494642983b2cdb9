"""One batch at a time on a stream of a GPU: in by pinned memory, computed, out by pinned memory.

Each lane of the device has one of these. On its stream the copies and kernels of a batch follow each other, and those
of other lanes' batches run beside them: a GPU copies in, computes and copies out at the same time. A batch of fixed
shape is a CUDA graph, which one call starts instead of one for every kernel; small models are bound by these calls.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import NamedTuple, TypeAlias

import torch

from leanserve.memory import is_out_of_memory
from leanserve.runtime.cuda.card import Card
from leanserve.runtime.cuda.faults import is_lost

logger = logging.getLogger(__name__)

DeviceTensors: TypeAlias = tuple[torch.Tensor, ...]
ComputeOnDevice: TypeAlias = Callable[[DeviceTensors], DeviceTensors]

MOST_GRAPHS = 16
"""Of a lane; each holds its inputs and outputs besides what all share. Row buckets are powers of two."""
UNRECORDED_RUNS = 2
"""Before a graph is recorded: libraries choose their kernels and set up their work space, which cannot be recorded."""


class _Graph(NamedTuple):
    """A recorded batch: where its inputs are read and its outputs are left, and what starts it."""

    inputs: DeviceTensors
    outputs: DeviceTensors
    replay: Callable[[], None]


class PinnedBuffer:
    """Pinned memory for one tensor, as large as the largest that it has held."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self._bytes = card.pinned(1)

    def view(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """It as a tensor of that shape and dtype; what it held before is lost."""
        size = prod(shape) * dtype.itemsize
        if size > len(self._bytes):
            self._bytes = self._card.pinned(size)
        return self._bytes[:size].view(dtype).view(tuple(shape))


class StreamLane:
    """Runs batches on a stream of its own; of one thread at a time."""

    def __init__(self, card: Card, compute: ComputeOnDevice, recorded_rows: Sequence[int]) -> None:
        """`recorded_rows`: the numbers of rows for which a graph is recorded at the first batch."""
        self._card = card
        self._compute = compute
        self._recorded_rows = frozenset(recorded_rows)
        self._stream = card.stream()
        self._pool = card.pool() if recorded_rows else None
        self._graphs: dict[tuple[torch.Size, ...], _Graph] = {}
        self._incoming: list[PinnedBuffer] = []
        self._outgoing: list[PinnedBuffer] = []

    def run(self, batch: DeviceTensors) -> DeviceTensors:
        """The outputs of a batch, both in the host's memory; all of it is done when it returns."""
        with self._card.on(self._stream):
            graph = self._graph_for(batch)
            inputs = graph.inputs if graph else tuple(self._card.empty_like(item) for item in batch)
            for source, target, buffer in zip(batch, inputs, _as_many(self._incoming, batch, self._card), strict=True):
                staged = buffer.view(source.shape, source.dtype)
                staged.copy_(source)
                self._card.copy(staged, target)
            if graph:
                graph.replay()
            outputs = graph.outputs if graph else self._compute(inputs)
            staged_outputs = self._staged(outputs)
            for source, staged in zip(outputs, staged_outputs, strict=True):
                self._card.copy(source, staged)
        self._card.wait(self._stream)
        return tuple(item.clone() for item in staged_outputs)  # the next batch overwrites what was staged

    def prepare(self, batch: DeviceTensors) -> None:
        """Record a graph for batches of this shape, if they are to have one."""
        with self._card.on(self._stream):
            self._graph_for(batch)

    def forget_graphs(self) -> None:
        """Let go of what was recorded, with its memory, and record no more."""
        self._recorded_rows = frozenset()
        self._graphs.clear()

    def _staged(self, outputs: DeviceTensors) -> DeviceTensors:
        buffers = _as_many(self._outgoing, outputs, self._card)
        return tuple(buffer.view(item.shape, item.dtype) for item, buffer in zip(outputs, buffers, strict=True))

    def _graph_for(self, batch: DeviceTensors) -> _Graph | None:
        shapes = tuple(item.shape for item in batch)
        known = self._graphs.get(shapes)
        if known is None and len(batch[0]) in self._recorded_rows and len(self._graphs) < MOST_GRAPHS:
            known = self._record(batch)
            if known is not None:
                self._graphs[shapes] = known
        return known

    def _record(self, batch: DeviceTensors) -> _Graph | None:
        """`None`, told once, where the model cannot be recorded: it then runs kernel by kernel."""
        inputs = tuple(self._card.empty_like(item) for item in batch)
        try:
            with _recording():  # others that record or load wait: recording bears no company
                for source, target in zip(batch, inputs, strict=True):
                    target.copy_(source)
                for _ in range(UNRECORDED_RUNS):
                    self._compute(inputs)
                self._card.wait(self._stream)
                replay, outputs = self._card.capture(self._stream, self._pool, lambda: self._compute(inputs))
        except Exception as error:
            if is_out_of_memory(error) or is_lost(error):
                raise
            logger.warning("no CUDA graph on %s, kernels are started one by one: %s", self._card.name, error)
            self.forget_graphs()
            return None
        return _Graph(inputs, outputs, replay)


@cache
def _recording() -> threading.Lock:
    """Held by the one lane of the process that records."""
    return threading.Lock()


def _as_many(buffers: list[PinnedBuffer], tensors: DeviceTensors, card: Card) -> list[PinnedBuffer]:
    while len(buffers) < len(tensors):
        buffers.append(PinnedBuffer(card))
    return buffers
