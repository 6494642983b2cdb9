"""Runs torch modules on an NVIDIA GPU: weights there once, a stream for every lane, graphs for fixed shapes.

Products of float32 are computed in float32, as onnxruntime's CUDA provider is told to do here, too; `cast: tf32` is
what changes that. Convolutions in 16 bits get channels last, the layout of tensor cores.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from leanserve.contracts import Arrays, Result, TorchModel
from leanserve.errors import DeviceLost
from leanserve.memory import forget, is_out_of_memory
from leanserve.runtime.assembly import dynamic_axes
from leanserve.runtime.backends.pytorch import (
    has_channels_last_weights,
    to_channels_last,
    torch_dtype,
    writable_view,
)
from leanserve.runtime.cuda.card import Card
from leanserve.runtime.cuda.faults import is_lost
from leanserve.runtime.cuda.stream_lane import DeviceTensors, StreamLane

ROW_BUCKETS = tuple(2**power for power in range(13))
"""Batches of fixed shape are padded to one of these, each of which has a graph: 1 to 4096."""
NARROW = frozenset({torch.float16, torch.bfloat16})


class TorchCudaBackend:
    """A `contracts.Backend` that `lanes` threads may run at once.

    A module with an attribute `row_buckets` is compiled, and is fed as it was; it makes its own graphs, if any. Where
    the sizes of rows vary, no two batches are alike, and kernels are started one by one.
    """

    name = "pytorch"
    self_contained = True

    def __init__(self, model: TorchModel, card: Card, lanes: int = 1) -> None:
        _compute_float32_in_float32()
        self._card = card
        compiled: tuple[int, ...] | None = getattr(model.module, "row_buckets", None)
        module = model.module.eval()
        self._channels_last = compiled is None and _wants_channels_last(module)
        if self._channels_last:
            module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stubs lack it
        self._module = card.place(module)
        self._dtypes = [torch_dtype(item.dtype) for item in model.spec.outputs]
        fixed = compiled is None and not dynamic_axes(model.spec.inputs)
        self._row_buckets = ROW_BUCKETS if fixed else compiled or ()
        self._recorded = ROW_BUCKETS if fixed else ()
        self._idle = [self._new_lane() for _ in range(lanes)]
        """Whoever runs takes one, which lists do in one step."""
        self._met: set[tuple[torch.Size, ...]] = set()
        """Shapes of which lanes have recorded their graphs: they are not to do so while a batch is timed."""

    @property
    def device(self) -> str:
        return self._card.name

    @property
    def row_buckets(self) -> tuple[int, ...]:
        return self._row_buckets

    def run(self, batch: Arrays) -> Result:
        """As `contracts.Backend`. Of memory that ran out, what can be is given back before the error is raised.

        Raises:
            DeviceLost: of a fault after which the GPU answers this process nothing right any more.
        """
        lane, before = self._taken(), self._compilations()
        try:
            with torch.inference_mode():
                tensors = tuple(torch.from_numpy(writable_view(array)) for array in batch)
                if self._recorded:
                    self._prepare_others(tensors)
                outputs = lane.run(tensors)
        except Exception as error:
            if is_lost(error):
                raise DeviceLost(f"{self.device} is lost to this process: {error}") from error
            if is_out_of_memory(error):
                forget(error)
                self._card.release()
            raise
        finally:
            self._idle.append(lane)
        made = self._compilations() - before
        return Result(tuple(item.numpy() for item in outputs), {"compiled_graphs": made} if made else {})

    def close(self) -> None:
        """Let go of weights, graphs and buffers."""
        self._idle.clear()
        self._module = torch.nn.Identity()
        self._card.release()

    def _compute(self, inputs: DeviceTensors) -> DeviceTensors:
        if self._channels_last:
            inputs = tuple(to_channels_last(item) for item in inputs)
        outputs = self._module(*inputs)
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(item.to(dtype) for item, dtype in zip(tensors, self._dtypes, strict=True))

    def _taken(self) -> StreamLane:
        try:
            return self._idle.pop()
        except IndexError:  # the event loop runs a batch in the stead of a lane
            return self._new_lane()

    def _prepare_others(self, batch: DeviceTensors) -> None:
        """At the first batch of a shape, which is at warm-up, have all idle lanes record it."""
        shapes = tuple(item.shape for item in batch)
        if shapes in self._met:
            return
        self._met.add(shapes)
        idle: list[StreamLane] = []
        with suppress(IndexError):
            while True:
                idle.append(self._idle.pop())
        try:
            for lane in idle:
                lane.prepare(batch)
        finally:
            self._idle += idle

    def _new_lane(self) -> StreamLane:
        return StreamLane(self._card, self._compute, self._recorded)

    def _compilations(self) -> int:
        return int(getattr(self._module, "compilations", 0))


def _compute_float32_in_float32() -> None:
    """Convolutions would have 10 bits by default. It is a setting of the process, as `cast` makes and restores it."""
    cudnn: Any = torch.backends.cudnn
    for setting in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn):
        setting.fp32_precision = "ieee"


def _wants_channels_last(module: torch.nn.Module) -> bool:
    narrow = any(weight.ndim == 4 and weight.dtype in NARROW for weight in module.parameters())
    return narrow or has_channels_last_weights(module)
