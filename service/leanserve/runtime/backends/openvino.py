"""Runs graphs with OpenVINO: on CPUs with VNNI or BF16 the fastest engine for many models.

A compiled model has a *stream* for every thread that runs it at once, which are the device's lanes, and shares its
weights among them. Its threads are its own and sleep between batches. OpenVINO would pin them to cores, where those of
two models or processes fight for one; would size its pools by the affinity of the process and not by its quota; and
would compute in bfloat16 wherever the CPU can, without a word. All three are set.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import openvino

from leanserve.contracts import Arrays, ModelSpec, Result


class OpenVinoBackend:
    """A `contracts.Backend`."""

    name = "openvino"
    device = "cpu"
    self_contained = True
    row_buckets: tuple[int, ...] = ()

    def __init__(self, graph: Path, spec: ModelSpec, precision: str, threads: int, callers: int = 1) -> None:
        """`precision` is that of sums and of what is not quantized, in OpenVINO's words. `callers` are the threads
        that run it at once, each of them with `threads` CPU threads."""
        self._compiled: Any = _core().compile_model(str(graph), "CPU", _config(precision, threads, callers))
        self._inputs = [item.name for item in spec.inputs]
        self._outputs = [self._compiled.output(item.name) for item in spec.outputs]
        self._idle = [self._compiled.create_infer_request() for _ in range(callers)]
        """A request holds the memory of one run; whoever runs takes one, which lists do in one step."""

    def run(self, batch: Arrays) -> Result:
        request = self._taken()
        try:
            found = request.infer(dict(zip(self._inputs, batch, strict=True)), share_inputs=True, share_outputs=False)
            return Result(tuple(found[output] for output in self._outputs))
        finally:
            self._idle.append(request)

    def _taken(self) -> Any:
        try:
            return self._idle.pop()
        except IndexError:  # the event loop runs a batch in the stead of a lane
            return self._compiled.create_infer_request()

    def close(self) -> None:
        """Free the compiled model with its threads and memory."""
        self._idle.clear()
        self._outputs.clear()
        del self._compiled


def _config(precision: str, threads: int, callers: int) -> dict[str, Any]:
    return {
        "NUM_STREAMS": callers,
        "INFERENCE_NUM_THREADS": threads * callers,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": precision,
        "CPU_DENORMALS_OPTIMIZATION": True,
    }


@cache
def _core() -> Any:
    return openvino.Core()
