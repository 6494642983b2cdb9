"""The models as they run without leanserve: the file in onnxruntime, the module in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Original = Callable[[Mapping[str, Array]], Sequence[Array]]
"""Outputs for one row, given by the names of the inputs, each with a first axis of size 1."""


def onnx_file(path: Path) -> Original:
    """The file as it is; of a graph without an axis of rows, a row is everything that it takes."""

    def run(row: Mapping[str, Array]) -> Sequence[Array]:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        ranks = {item.name: len(item.shape) for item in session.get_inputs()}
        whole = any(row[name].ndim == rank + 1 for name, rank in ranks.items())
        taken = {name: np.asarray(row[name][0]) if whole else row[name] for name in ranks}
        given = [_as_array(item) for item in session.run(None, taken)]
        return [item[None] for item in given] if whole else given

    return run


def _as_array(item: Any) -> Array:
    """An output; maps of classic classifiers as the numbers in them."""
    maps = isinstance(item, list) and all(isinstance(row, dict) for row in item)
    return np.array([list(row.values()) for row in item], np.float32) if maps else np.asarray(item)


def torch_module(make: Callable[[], Any], pick: Callable[[Any], Any] = lambda outputs: outputs) -> Original:
    """A module on the row's arrays in their order; `pick` takes what is served from what it returns."""

    def run(row: Mapping[str, Array]) -> Sequence[Array]:
        import torch

        module = make().eval().float()
        with torch.inference_mode():
            given = pick(module(*(torch.from_numpy(array.copy()) for array in row.values())))
        return [item.numpy() for item in (given if isinstance(given, tuple | list) else (given,))]

    return run
