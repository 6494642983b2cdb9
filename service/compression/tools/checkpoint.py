"""Training checkpoints without pickle: tensors of module and optimiser as safetensors, everything else as JSON beside.

A checkpoint is swapped in whole, so that a kill at any moment leaves one that can be read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

from service.contracts import Json

if TYPE_CHECKING:
    import torch
    from torch import nn

MODULE, OPTIMISER = "module.", "optimiser."


def write_checkpoint(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, notes: Json) -> None:
    """Write a checkpoint beside the old one and swap."""
    import torch
    from safetensors.torch import save_file

    state = optimiser.state_dict()
    tensors = {MODULE + name: tensor for name, tensor in module.state_dict().items()}
    plain: dict[str, Json] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, torch.Tensor) else plain)[f"{OPTIMISER}{index}.{name}"] = value
    told = json.dumps({"notes": notes, "plain": plain, "groups": state["param_groups"]})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial, {"told": told})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def read_notes(path: Path) -> Json | None:
    """The notes of a checkpoint; `None` if there is none, or none that can be read: then training starts anew."""
    from safetensors import SafetensorError

    try:
        return _told(path)["notes"] if path.exists() else None
    except (SafetensorError, ValueError):
        return None


def read_checkpoint(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Put module and optimiser in the state in which they were written."""
    from safetensors.torch import load_file

    tensors, told = load_file(path), _told(path)
    module.load_state_dict({name.removeprefix(MODULE): tensors[name] for name in tensors if name.startswith(MODULE)})
    state: dict[int, dict[str, Json]] = {}
    for place, value in {**tensors, **told["plain"]}.items():
        if place.startswith(OPTIMISER):
            index, _, name = place.removeprefix(OPTIMISER).partition(".")
            state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict({"state": state, "param_groups": told["groups"]})


def _told(path: Path) -> dict[str, Json]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return cast("dict[str, Json]", json.loads(file.metadata()["told"]))
