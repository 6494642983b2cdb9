"""onnxruntime's sessions with inputs bound to memory of the GPU, which is kept from batch to batch.

Without it every run allocates device memory for what comes in. What goes out stays there until the copy to the host,
with which the run ends: its time is exact.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnxruntime

from leanserve.contracts import Arrays

MOST_BOUND = 32
"""Sets of inputs that are kept; of the shapes that were run longest ago none is."""
_Shapes: TypeAlias = tuple[tuple[tuple[int, ...], str], ...]


class _Bound(NamedTuple):
    inputs: Sequence[Any]
    binding: Any


class BoundSession:
    """Runs a session, on any number of threads at once."""

    def __init__(self, session: Any, inputs: Sequence[str], outputs: Sequence[str], device: str) -> None:
        """`device` is `cuda:N`; `cpu` does the same in the host's memory."""
        self._session = session
        self._inputs, self._outputs = inputs, outputs
        self._kind, _, number = device.partition(":")
        self._number = int(number or 0)
        self._idle: OrderedDict[_Shapes, list[_Bound]] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, batch: Arrays) -> Arrays:
        """The outputs, in new arrays of the host."""
        shapes = tuple((array.shape, array.dtype.str) for array in batch)
        bound = self._taken(shapes) or self._bind(batch)
        for value, array in zip(bound.inputs, batch, strict=True):
            value.update_inplace(np.ascontiguousarray(array))
        self._session.run_with_iobinding(bound.binding)
        found = tuple(bound.binding.copy_outputs_to_cpu())
        self._keep(shapes, bound)  # not after an error: a set of inputs for which memory lacked is let go
        return found

    def clear(self) -> None:
        """Let go of all that is kept."""
        with self._lock:
            self._idle.clear()

    def _taken(self, shapes: _Shapes) -> _Bound | None:
        with self._lock:
            kept = self._idle.get(shapes)
            return kept.pop() if kept else None

    def _keep(self, shapes: _Shapes, bound: _Bound) -> None:
        with self._lock:
            self._idle.setdefault(shapes, []).append(bound)
            self._idle.move_to_end(shapes)
            while sum(map(len, self._idle.values())) > MOST_BOUND:
                self._idle.popitem(last=False)

    def _bind(self, batch: Arrays) -> _Bound:
        binding = self._session.io_binding()
        values = [
            onnxruntime.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype, self._kind, self._number)
            for array in batch
        ]
        for name, value in zip(self._inputs, values, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, self._kind, self._number)
        return _Bound(values, binding)
