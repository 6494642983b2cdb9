"""Weights of a float32 model that are stored in fewer bits, and widened when it is loaded.

Every stored tensor holds its values exactly: the pass that chose the type has rounded them to it. Those of 8 bits
(e4m3: 4 bits of exponent, 3 of mantissa; Micikevicius et al. 2022) have a scale each, a power of two, which loses
nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from leanserve.runtime.formats.tied_tensors import ties_of
from leanserve.runtime.formats.torch_masks import KEPT

STORAGE: Final = "storage"
"""Where the header of a file has the types, by name of a tensor."""
SCALE: Final = "scale:"
"""Before the name of a tensor of 8 bits, that of its scale. No parameter is called so."""
DTYPES: Final[Mapping[str, torch.dtype]] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}
LARGEST_FP8: Final = 448.0
"""Of the numbers of 8 bits with 3 bits of mantissa (e4m3)."""


def scale_of(tensor: Tensor) -> float:
    """The power of two that brings the largest value just below the largest of 8 bits."""
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    return 2.0 ** math.ceil(math.log2(largest / LARGEST_FP8)) if largest else 1.0


def narrowed(tensor: Tensor, storage: str) -> tuple[Tensor, float]:
    """A tensor in the type that it is stored in, and the scale that it is to be multiplied by again."""
    scale = scale_of(tensor) if storage == "fp8" else 1.0
    return (tensor.float() / scale).to(DTYPES[storage]), scale


def rounded_to(tensor: Tensor, storage: str) -> Tensor:
    """A float32 tensor with the values that storing it would leave."""
    narrow, scale = narrowed(tensor, storage)
    return narrow.float() * scale


def narrow_state(state: Mapping[str, Tensor], storage: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as they are stored, and notes for the header; `storage` says which, by name of the parameter."""
    types = {place: storage[name] for name in storage for place in (name, KEPT + name) if place in state}
    scales: dict[str, Tensor] = {}

    def narrow(name: str) -> Tensor:
        tensor, scale = narrowed(state[name], types[name])
        if types[name] == "fp8":
            scales[SCALE + name] = torch.tensor(scale)
        return tensor

    made = _each_once(state, types, narrow)
    return {**state, **made, **scales}, {STORAGE: json.dumps(types)} if types else {}


def wide_state(stored: Mapping[str, Tensor], notes: Mapping[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `narrow_state` was given: tensors in float32, and how they are stored, by name of the parameter."""
    types: dict[str, str] = json.loads(notes.get(STORAGE, "{}"))

    def widen(name: str) -> Tensor:
        return stored[name].float() * stored.get(SCALE + name, torch.ones(()))

    others = {name: tensor for name, tensor in stored.items() if not name.startswith(SCALE)}
    names = {name.removeprefix(KEPT): storage for name, storage in types.items()}
    return {**others, **_each_once(stored, types, widen)}, names


def _each_once(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], change: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """Changed tensors by name; what is one tensor under several names stays one."""
    first = {name: tie[0] for tie in ties_of(tensors) for name in tie}
    made: dict[str, Tensor] = {}
    for name in names:
        owner = first.get(name, name)
        made[name] = made[owner] if owner in made else change(name)
        made.setdefault(owner, made[name])
    return {name: made[name] for name in names}
