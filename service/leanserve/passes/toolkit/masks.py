"""Which weights a sparse model has: a mask of each, so that whatever trains it later leaves the others at zero.

A mask is an explicit value of the model, `TorchModel.masks`, and is stored with its weights, a bit per weight. Zeros
alone do not tell: a weight that is kept may be zero, and a layer that is wholly zero may be an initialisation that is
to learn. They are believed only of weights without a mask, such as those of a base that was sparse when it was brought.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from leanserve.contracts import TorchModel
from leanserve.passes.toolkit.training_run import TrainingCallback, TrainingRun
from leanserve.runtime.formats.torch_masks import fitting_masks

if TYPE_CHECKING:
    from leanserve.passes.toolkit.checkpoint import TrainingState


def masks_of(model: TorchModel) -> dict[str, Tensor]:
    """By the name of a parameter, bool in its shape, `False` where it stays zero: its mask, else its zeros."""
    return {**_patterns(model.module), **fitting_masks(model)}


class KeepMasks(TrainingCallback):
    """Weights outside of their mask stay zero. Callbacks that make a model sparse while it trains change `masks`."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = dict(masks)

    def begin(self, run: TrainingRun) -> None:
        self._apply(run.module)

    def end_step(self, run: TrainingRun) -> None:
        self._apply(run.module)

    def end(self, run: TrainingRun) -> None:
        self._apply(run.module)

    def state(self) -> TrainingState:
        return self.masks

    def restore(self, state: TrainingState) -> None:
        self.masks = dict(state)

    @torch.no_grad()
    def _apply(self, module: nn.Module) -> None:
        for name, mask in self.masks.items():
            weight = module.get_parameter(name)
            weight.masked_fill_(~mask.to(weight.device), 0)


def _patterns(module: nn.Module) -> dict[str, Tensor]:
    """What is not zero in every matrix or kernel that has some zeros, and more."""
    masks = {name: weight.detach() != 0 for name, weight in module.named_parameters() if weight.ndim > 1}
    return {name: mask for name, mask in masks.items() if bool(mask.any()) and not bool(mask.all())}
