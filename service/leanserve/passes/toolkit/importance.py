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

from leanserve.contracts import ArrayData, Data, TorchModel
from leanserve.errors import PassFailed
from leanserve.memory import largest_that_fits
from leanserve.passes.toolkit.objectives import cross_entropy

Importance: TypeAlias = Callable[[Any], Tensor | None]
"""Channel scores [width] of a dependency group, or `None` where the criterion does not apply to it."""
Criterion: TypeAlias = Literal["l1", "l2", "taylor", "hessian", "bn_scale", "fpgm", "lamp", "group_lasso"]
BY_LABELS: frozenset[Criterion] = frozenset({"taylor", "hessian"})
"""Criteria that need gradients of the loss on labelled rows."""

GRADIENT_ROWS = 32


def importance_of(criterion: Criterion, model: TorchModel, data: Data | None) -> Importance:
    """The importance of channels in `model`; `taylor` and `hessian` leave gradients of the loss on
    labelled `data` in it.

    Raises:
        PassFailed: the criterion does not fit the model or the data.
    """
    from torch_pruning.pruner import importance

    if criterion == "taylor":
        largest_that_fits(GRADIENT_ROWS, lambda rows: _gradients(model, data, rows, criterion))
        return importance.GroupTaylorImportance()
    if criterion == "hessian":
        _squared_gradients(model, data)
        curvature: Any = importance.GroupHessianImportance
        return cast(Importance, curvature())
    if criterion == "fpgm":
        return _from_the_median
    if criterion == "lamp":
        layered: Any = importance.LAMPImportance
        return cast(Importance, layered(p=2))
    if criterion == "bn_scale":
        if not any(isinstance(child, nn.BatchNorm2d | nn.BatchNorm1d) for child in model.module.modules()):
            raise PassFailed("importance: bn_scale ranks channels by batch norm, which this model has not; take l2")
        slimming: Any = importance.BNScaleImportance
        return cast(Importance, slimming())
    return importance.GroupMagnitudeImportance(p=1 if criterion == "l1" else 2)


def _gradients(model: TorchModel, data: Data | None, rows: int, criterion: Criterion) -> None:
    """Sum the gradients of the cross entropy over `data` in the model's parameters, so many rows at a time."""
    model.module.zero_grad()
    spec = model.spec
    for batch in data.batches(rows) if data else ():
        if batch.labels is None or not np.issubdtype(batch.labels.dtype, np.integer):
            raise PassFailed(f"importance: {criterion} needs training data with class labels; take l1, l2 or bn_scale")
        outputs = tree_leaves(model.module(*(torch.tensor(array) for array in batch.inputs)))
        meaning = spec.outputs[spec.labelled].meaning
        loss = cross_entropy(outputs[spec.labelled], torch.tensor(batch.labels), meaning) * len(batch.labels)
        torch.autograd.backward(loss)


def _squared_gradients(model: TorchModel, data: Data | None) -> None:
    """Leave the mean of every row's squared gradients in the model's parameters: the diagonal of the Fisher matrix,
    which stands for the loss's curvature."""
    sums: dict[str, Tensor] = {}
    for row in data.batches(1) if data else ():
        _gradients(model, ArrayData(row.inputs, row.labels), 1, "hessian")
        for name, weight in model.module.named_parameters():
            if weight.grad is not None:
                sums[name] = weight.grad.square() + sums.get(name, 0)
    for name, total in sums.items():
        model.module.get_parameter(name).grad = total / max(1, len(data or ()))


def _from_the_median(group: Any) -> Tensor | None:
    """How far each filter is from all others (He et al. 2019): one near their geometric median can be told from them.

    Of the layers that make the channels, each as a share of its mean.
    """
    from torch_pruning.pruner import function

    makers = (function.prune_conv_out_channels, function.prune_linear_out_channels)
    scores = []
    for dep, idxs in group:
        if dep.handler in makers:
            filters = dep.target.module.weight.detach()[idxs].flatten(1)
            apart = torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
            scores.append(apart / apart.mean().clamp_min(1e-12))
    return torch.stack(scores).mean(0) if scores else None
