"""Random changes of training rows that leave their meaning alone, so that few rows teach like many.

Teacher and student see the same changed row, so that even what no longer has a label of its own teaches: a mixture of
two images (`mixup`), or a text with words of another (`tokens`). Beyer et al., "Knowledge distillation: A good teacher
is patient and consistent", 2022. The border is repeated rather than filled: inputs are normalised, and zero is then a
grey that no real image has there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeAlias

from pydantic import BeforeValidator

from leanserve.errors import PassFailed

if TYPE_CHECKING:
    import torch

    from leanserve.contracts import TensorSpec

    Inputs: TypeAlias = tuple[torch.Tensor, ...]

Augment = Literal["shift", "affine", "flip", "crop", "cutout", "mixup", "randaugment", "tokens"]

SHIFT = 0.1
"""Largest shift, as a share of the image's side."""
CROP = 0.125
"""As `SHIFT`, of a crop, which moves by whole pixels: 4 of 32 (He et al. 2015)."""
ROTATION = math.radians(12)
SCALE = 0.12
HOLE = 0.5
"""Side of the square that `cutout` takes out, as a share of the image's (DeVries and Taylor 2017)."""
REPLACED = 0.1
"""Share of the tokens of a text that come from another."""


def _named(value: object) -> object:
    """One name, or `none`, for a list."""
    if isinstance(value, str):
        return () if value == "none" else (value,)
    return value


Augments = Annotated[tuple[Augment, ...], BeforeValidator(_named)]
"""Changes in the order in which they are made; in a config a name, a list of names, or `none`."""


def augmented(names: Sequence[Augment], inputs: Inputs) -> Inputs:
    """Inputs of a batch, those that the changes are for changed; draws from torch's global generator."""
    for name in names:
        if name == "tokens":
            inputs = _other_tokens(inputs)
        else:
            inputs = tuple(IMAGES[name](item) if item.ndim == 4 else item for item in inputs)
    return inputs


def require_augmentable(names: Sequence[Augment], inputs: Sequence[TensorSpec]) -> None:
    """Check that a model has inputs that the changes are for.

    Raises:
        PassFailed: it has not.
    """
    images = any(len(item.shape) == 3 for item in inputs)
    texts = any(_of_tokens(item) for item in inputs)
    for name in names:
        if not (texts if name == "tokens" else images):
            told = ", ".join(f"{item.name} {list(item.shape)}" for item in inputs)
            kind = "a text (whole numbers by position)" if name == "tokens" else "an image (C, H, W)"
            raise PassFailed(f"augment is '{name}', but no input is {kind}: {told}")


def _of_tokens(item: TensorSpec) -> bool:
    return len(item.shape) == 1 and item.dtype.startswith("int")


def _shift(images: torch.Tensor) -> torch.Tensor:
    rows = len(images)
    return _warp(images, _zeros(rows), 1 + _zeros(rows), _zeros(rows), SHIFT)


def _affine(images: torch.Tensor) -> torch.Tensor:
    rows = len(images)
    angle = _uniform(rows, ROTATION)
    return _warp(images, angle, 1 + _uniform(rows, SCALE), _zeros(rows), SHIFT)


def _flip(images: torch.Tensor) -> torch.Tensor:
    import torch

    mirrored = (torch.rand(len(images)) < 0.5).to(images.device)
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)


def _crop(images: torch.Tensor) -> torch.Tensor:
    """Each image moved by whole pixels: sharp, where `shift` blurs."""
    for axis in (-2, -1):
        images = images.gather(axis, _moved(images, axis).expand_as(images))
    return images


def _moved(images: torch.Tensor, axis: int) -> torch.Tensor:
    """Where along the axis each place of each image is taken from, to be broadcast."""
    import torch

    side = images.shape[axis]
    most = int(CROP * side)
    begin = torch.randint(-most, most + 1, (len(images), 1), device="cpu")
    places = (begin + torch.arange(side)).clamp(0, side - 1).to(images.device)
    return places.view((-1, 1, side, 1) if axis == -2 else (-1, 1, 1, side))


def _cutout(images: torch.Tensor) -> torch.Tensor:
    """A square of each image becomes its mean colour; squares may reach beyond the border."""
    inside = None
    for axis in (-2, -1):
        side = images.shape[axis]
        apart = (_positions(images, axis) - (_uniform(len(images), 0.5) + 0.5).to(images.device)[:, None] * side).abs()
        near = (apart < HOLE * side / 2).view((-1, 1, side, 1) if axis == -2 else (-1, 1, 1, side))
        inside = near if inside is None else inside & near
    assert inside is not None
    return images.where(~inside, images.mean((-2, -1), keepdim=True))


def _positions(images: torch.Tensor, axis: int) -> torch.Tensor:
    import torch

    return torch.arange(images.shape[axis], device=images.device) + 0.5


def _mixup(images: torch.Tensor) -> torch.Tensor:
    """Each image with another of the batch, in a share that is uniform on 0..1 (Zhang et al. 2018)."""
    import torch

    share = torch.rand(len(images)).to(images.device).view(-1, 1, 1, 1)
    return share * images + (1 - share) * images[torch.randperm(len(images)).to(images.device)]


def _randaugment(images: torch.Tensor) -> torch.Tensor:
    """Of each image two of: rotation, zoom, shear, contrast, brightness (after Cubuk et al. 2020)."""
    import torch

    for _ in range(2):
        chosen = torch.randint(5, (len(images),))
        amounts = _uniform(len(images), 1.0)
        rotation, zoom, shear, contrast, brightness = (amounts * (chosen == place) for place in range(5))
        images = _warp(images, rotation * 2 * ROTATION, 1 + 2 * SCALE * zoom, 0.3 * shear, 0.0)
        mean, spread = images.mean((1, 2, 3), keepdim=True), images.std((1, 2, 3), keepdim=True)
        factor = (1 + 0.5 * contrast).to(images.device).view(-1, 1, 1, 1)
        images = (images - mean) * factor + mean + 0.5 * brightness.to(images.device).view(-1, 1, 1, 1) * spread
    return images


def _other_tokens(inputs: Inputs) -> Inputs:
    """Some tokens of each text become those that stand in their place in another text of the batch.

    Whatever is 0 in one of the inputs of tokens (ids, masks) is padding and stays so, and so does the first token.
    """
    import torch

    tokens = [item for item in inputs if item.ndim == 2 and not item.is_floating_point()]
    if not tokens:
        return inputs
    other = torch.randperm(len(tokens[0])).to(tokens[0].device)
    taken = (torch.rand(tokens[0].shape) < REPLACED).to(tokens[0].device)
    taken[:, :1] = False
    for item in tokens:
        taken &= (item != 0) & (item[other] != 0)
    return tuple(item.where(~taken, item[other]) if any(item is one for one in tokens) else item for item in inputs)


IMAGES: Final[Mapping[Augment, Callable[[torch.Tensor], torch.Tensor]]] = {
    "shift": _shift,
    "affine": _affine,
    "flip": _flip,
    "crop": _crop,
    "cutout": _cutout,
    "mixup": _mixup,
    "randaugment": _randaugment,
}
"""Images [N, C, H, W] to images."""


def _warp(
    images: torch.Tensor, angle: torch.Tensor, zoom: torch.Tensor, shear: torch.Tensor, shift: float
) -> torch.Tensor:
    """Each image by its own transform, and moved at random by up to a share `shift` of its side."""
    import torch
    import torch.nn.functional as F

    rows = len(images)
    # affine_grid's coordinates run from -1 to 1: a shift by a share of the side is twice that share.
    columns = [zoom * angle.cos(), shear - zoom * angle.sin(), _uniform(rows, 2 * shift)]
    columns += [zoom * angle.sin(), zoom * angle.cos(), _uniform(rows, 2 * shift)]
    transform = torch.stack(columns, dim=1).view(rows, 2, 3).to(images.device)
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _uniform(rows: int, limit: float) -> torch.Tensor:
    import torch

    return (torch.rand(rows) * 2 - 1) * limit


def _zeros(rows: int) -> torch.Tensor:
    import torch

    return torch.zeros(rows)
