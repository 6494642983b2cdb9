"""The masks of a sparse model as they are stored beside its weights, a bit per weight."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from leanserve.contracts import TorchModel

MASK = "mask:"
"""Before the name of a weight, that of its stored mask. No parameter is called so."""


def fitting_masks(model: TorchModel) -> dict[str, Tensor]:
    """The masks whose weight still is there and has their shape: structural passes remove and reshape some."""
    shapes = {name: weight.shape for name, weight in model.module.named_parameters()}
    return {name: mask for name, mask in model.masks.items() if shapes.get(name) == mask.shape}


def packed_masks(model: TorchModel) -> dict[str, Tensor]:
    """The model's masks as tensors to be stored beside its weights."""
    masks = {name: mask.contiguous().numpy() for name, mask in fitting_masks(model).items()}
    return {MASK + name: torch.from_numpy(np.packbits(mask)) for name, mask in masks.items()}


def unpacked_masks(stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Stored tensors without `packed_masks`, and these."""
    packed = {name.removeprefix(MASK): tensor for name, tensor in stored.items() if name.startswith(MASK)}
    weights = {name: tensor for name, tensor in stored.items() if not name.startswith(MASK)}
    return weights, {name: _unpacked(bits, weights[name].shape) for name, bits in packed.items()}


def _unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel()).astype(bool)).reshape(shape)
