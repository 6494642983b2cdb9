"""Training checkpoints without pickle: tensors as safetensors, everything else as JSON in their header.

The state of a training is one flat mapping of dotted names (`module.conv.weight`, `optimiser.groups`,
`callback.0.best`) to tensors or JSON, so that whatever takes part in it (module, extra parameters, optimiser,
callbacks) comes back the same way. A checkpoint is swapped in whole, so that a kill at any moment leaves one that can
be read, and its tensors are checked against a checksum before training goes on from them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

TrainingState: TypeAlias = Mapping[str, Any]
"""Tensors and JSON by name."""

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def part_of(state: TrainingState, part: str) -> dict[str, Any]:
    """What stands under `part`, without that prefix."""
    return {name.removeprefix(f"{part}."): value for name, value in state.items() if name.startswith(f"{part}.")}


def as_part(state: TrainingState, part: str) -> dict[str, Any]:
    """The same names under `part`."""
    return {f"{part}.{name}": value for name, value in state.items()}


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, the module's own; what it adds to its state dict besides comes with the module."""
    import torch

    return {name: value.detach() for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


def optimiser_state(optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimiser knows, flat."""
    state = optimiser.state_dict()
    values = {f"{index}.{name}": value for index, own in state["state"].items() for name, value in own.items()}
    return {"groups": state["param_groups"], **as_part(values, "state")}


def restore_optimiser(optimiser: torch.optim.Optimizer, found: TrainingState) -> None:
    """Put an optimiser in the state that `optimiser_state` gave."""
    state: dict[int, dict[str, Any]] = {}
    for place, value in part_of(found, "state").items():
        index, _, name = place.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": found["groups"]})


def write_checkpoint(path: Path, state: TrainingState) -> None:
    """Write a checkpoint beside the old one and swap."""
    import torch

    from leanserve.runtime.formats.tied_tensors import write_tensors

    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    told = {"plain": {name: value for name, value in state.items() if name not in tensors}}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    write_tensors(tensors, partial, {"told": json.dumps({**told, "sha256": _checksum(tensors)})})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def read_training_checkpoint(path: Path) -> TrainingState | None:
    """The state in a checkpoint; `None` if there is none that is as it was written: then training starts anew."""
    from safetensors import SafetensorError

    from leanserve.runtime.formats.tied_tensors import read_tensors

    if not path.is_file():
        return None
    try:
        tensors, header = read_tensors(path)
        told = json.loads(header["told"])
        return {**told["plain"], **tensors} if told["sha256"] == _checksum(tensors) else None
    except (SafetensorError, ValueError, KeyError):
        return None


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    import torch

    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return total.hexdigest()
