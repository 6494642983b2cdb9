"""How models are saved, loaded, sized and opened: a file for each format, and this table of them.

Core code knows models by the name of their format alone. What a format needs is imported when one of its models is met.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

from leanserve.contracts import Backend, Format, Model, Share
from leanserve.errors import StartupError

FORMATS: Final[Mapping[str, str]] = {
    "torch": "leanserve.runtime.formats.torch",
    "onnx": "leanserve.runtime.formats.onnx",
    "openvino": "leanserve.runtime.formats.openvino",
    "aot_inductor": "leanserve.runtime.formats.aot_inductor",
}
"""Name of a format -> the module that has it as `FORMAT`."""


def format_named(name: str) -> Format[Any]:
    """The format of that name.

    Raises:
        StartupError: there is none.
    """
    if name not in FORMATS:
        raise StartupError(f"there is no format '{name}'; there are {', '.join(FORMATS)}")
    found: Format[Any] = import_module(FORMATS[name]).FORMAT
    return found


def open_backend(model: Model, share: Share) -> Backend:
    """Create the backend of a loaded model for this share of the machine. Call it on the thread that will run it.

    Of several GPUs each gets the model, unless its engine computes on the CPU.
    """
    format_ = format_named(model.format)
    first = format_.open(model, share._replace(devices=share.devices[:1]))
    if len(share.devices) == 1 or first.device == "cpu":
        return first
    from leanserve.runtime.cuda.replicas import Replicas

    others = (format_.open(model, share._replace(devices=(device,))) for device in share.devices[1:])
    return Replicas([first, *others])
