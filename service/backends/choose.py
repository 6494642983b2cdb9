"""Which backend runs a model: derived from what its passes produced, never configured."""

from __future__ import annotations

from service.contracts import Backend, Model, TorchModel


def open_backend(model: Model, threads: int) -> Backend:
    """Create the backend of a loaded model. Call it on the thread that will run it.

    Each backend library is imported only when a variant needs it.
    """
    if isinstance(model, TorchModel):
        from service.backends.pytorch import TorchBackend

        return TorchBackend(model, threads)
    from service.backends.onnx_runtime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(model, threads)
