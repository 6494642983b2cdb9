"""Random changes of training images that leave their meaning alone, so that few images teach like many.

The border is repeated rather than filled: inputs are normalised, and zero is then a grey that no real image has there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    import torch

    Inputs: TypeAlias = tuple[torch.Tensor, ...]

Augment = Literal["none", "shift", "affine"]

SHIFT = 0.1
"""Largest shift, as a share of the image's side."""
ROTATION = math.radians(12)
SCALE = 0.12


def _none(inputs: Inputs) -> Inputs:
    return inputs


def _shift(inputs: Inputs) -> Inputs:
    return tuple(_warp(item, rotation=0.0, scale=0.0) if item.ndim == 4 else item for item in inputs)


def _affine(inputs: Inputs) -> Inputs:
    return tuple(_warp(item, rotation=ROTATION, scale=SCALE) if item.ndim == 4 else item for item in inputs)


AUGMENTATIONS: Mapping[Augment, Callable[[Inputs], Inputs]] = {"none": _none, "shift": _shift, "affine": _affine}
"""Batches to batches. `shift` moves images (N, C, H, W); `affine` also rotates and scales them; the rest is kept."""


def _warp(images: torch.Tensor, rotation: float, scale: float) -> torch.Tensor:
    """Each image by its own random transform; draws from torch's global generator."""
    import torch
    import torch.nn.functional as F

    rows = len(images)
    angle = _uniform(rows, rotation)
    zoom = 1 + _uniform(rows, scale)
    # affine_grid's coordinates run from -1 to 1: a shift by a share of the side is twice that share.
    columns = [zoom * angle.cos(), -zoom * angle.sin(), _uniform(rows, 2 * SHIFT)]
    columns += [zoom * angle.sin(), zoom * angle.cos(), _uniform(rows, 2 * SHIFT)]
    transform = torch.stack(columns, dim=1).view(rows, 2, 3)
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _uniform(rows: int, limit: float) -> torch.Tensor:
    import torch

    return (torch.rand(rows) * 2 - 1) * limit
