"""How much each channel matters: the criteria by which structural pruning ranks them.

The scores themselves come from torch-pruning, which sums them over all layers that share a channel and divides them by
the group's mean, so that layers of different scale can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from leanserve.contracts import Data, TorchModel
from leanserve.errors import PassFailed
from leanserve.memory import largest_that_fits
from leanserve.passes.toolkit.objectives import cross_entropy

Importance: TypeAlias = Callable[[Any], Tensor | None]
"""Channel scores [width] of a dependency group, or `None` where the criterion does not apply to it."""
Criterion: TypeAlias = Literal["l1", "l2", "taylor", "bn_scale"]

GRADIENT_ROWS = 32


def importance_of(criterion: Criterion, model: TorchModel, data: Data | None) -> Importance:
    """The importance of channels in `model`; `taylor` leaves gradients of the loss on labelled `data` in it.

    Raises:
        PassFailed: the criterion does not fit the model or the data.
    """
    from torch_pruning.pruner import importance

    if criterion == "taylor":
        largest_that_fits(GRADIENT_ROWS, lambda rows: _gradients(model, data, rows))
        return importance.GroupTaylorImportance()
    if criterion == "bn_scale":
        if not any(isinstance(child, nn.BatchNorm2d | nn.BatchNorm1d) for child in model.module.modules()):
            raise PassFailed("importance: bn_scale ranks channels by batch norm, which this model has not; take l2")
        slimming: Any = importance.BNScaleImportance
        return cast(Importance, slimming())
    return importance.GroupMagnitudeImportance(p=1 if criterion == "l1" else 2)


def _gradients(model: TorchModel, data: Data | None, rows: int) -> None:
    """Sum the gradients of the cross entropy over `data` in the model's parameters, so many rows at a time."""
    model.module.zero_grad()
    spec = model.spec
    for batch in data.batches(rows) if data else ():
        if batch.labels is None or not np.issubdtype(batch.labels.dtype, np.integer):
            raise PassFailed("importance: taylor needs training data with class labels; take l1, l2 or bn_scale")
        outputs = tree_leaves(model.module(*(torch.tensor(array) for array in batch.inputs)))
        meaning = spec.outputs[spec.labelled].meaning
        loss = cross_entropy(outputs[spec.labelled], torch.tensor(batch.labels), meaning) * len(batch.labels)
        torch.autograd.backward(loss)
