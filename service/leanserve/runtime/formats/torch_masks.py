"""The masks of a sparse model as they are stored: a bit per weight, and of the weights only those that stay."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from leanserve.contracts import TorchModel
from leanserve.runtime.formats.tied_tensors import ties_of

MASK = "mask:"
"""Before the name of a weight, that of its stored mask. No parameter is called so."""
KEPT = "kept:"
"""Before the name of a weight, that of what its mask leaves of it, one after another."""


def fitting_masks(model: TorchModel) -> dict[str, Tensor]:
    """The masks whose weight still is there and has their shape: structural passes remove and reshape some."""
    shapes = {name: weight.shape for name, weight in model.module.named_parameters()}
    return {name: mask for name, mask in model.masks.items() if shapes.get(name) == mask.shape}


def packed_state(model: TorchModel) -> dict[str, Tensor]:
    """The model's tensors and masks as they are stored. Weights that share memory, or are not what their mask says,
    are stored whole beside it."""
    state = dict(model.module.state_dict())
    tied = {name for names in ties_of(state) for name in names}
    for name, mask in fitting_masks(model).items():
        state[MASK + name] = torch.from_numpy(np.packbits(mask.contiguous().numpy()))
        if name not in tied and not bool(state[name][~mask].any()):
            state[KEPT + name] = state.pop(name)[mask]
    return state


def unpacked_state(
    stored: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors and the masks of `packed_state`, given the shape of every weight."""
    bits = {name.removeprefix(MASK): tensor for name, tensor in stored.items() if name.startswith(MASK)}
    masks = {name: _unpacked(packed, shapes[name]) for name, packed in bits.items()}
    weights = {name: tensor for name, tensor in stored.items() if not name.startswith((MASK, KEPT))}
    for name, mask in masks.items():
        if (kept := stored.get(KEPT + name)) is not None:
            weights[name] = torch.zeros(mask.shape, dtype=kept.dtype)
            weights[name][mask] = kept
    return weights, masks


def _unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel()).astype(bool)).reshape(shape)
