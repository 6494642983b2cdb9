"""The one place where sessions of onnxruntime are opened: without telemetry.

onnxruntime has collected events on Linux, too, since 1.32, and warns where it finds no home that can be written.
Nothing of what is served is told to anybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnxruntime

CPU = ("CPUExecutionProvider",)


def onnx_session(
    model: str | bytes, options: onnxruntime.SessionOptions, providers: Sequence[Any] = CPU
) -> onnxruntime.InferenceSession:
    """A session over the file of that name, or over a serialised graph. Raises whatever onnxruntime raises."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    return onnxruntime.InferenceSession(model, options, providers=list(providers))
