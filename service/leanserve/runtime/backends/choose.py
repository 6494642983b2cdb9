"""Which backend runs a model: derived from what its passes produced, never configured."""

from __future__ import annotations

import sys

from leanserve.contracts import Backend, Model, TorchModel


def open_backend(model: Model, threads: int, *, alone: bool = False) -> Backend:
    """Create the backend of a loaded model, alone in this process or not. Call it on the thread that will run it.

    Each backend library is imported only when a variant needs it.
    """
    if isinstance(model, TorchModel):
        from leanserve.runtime.backends.pytorch import TorchBackend

        return TorchBackend(model, threads)
    from leanserve.runtime.backends.onnx_runtime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(model, threads, alone=alone)


def use_threads(threads: int) -> None:
    """Give torch this many threads: for a process in which models run with different numbers of them in turn.

    The setting holds for all threads of the process, whichever of them makes it. Other libraries need nothing: their
    models have threads of their own.
    """
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)
