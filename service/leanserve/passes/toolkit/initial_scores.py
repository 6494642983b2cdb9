"""Which weights an untrained network can do without: three scores, the higher the more a weight counts.

`snip`: how much the loss changes without it (Lee et al., "SNIP", 2019); `grasp`: how much less the gradient flows
without it (Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow", 2020); `synflow`: what
share of all paths from inputs to outputs leads through it, without any data (Tanaka et al., "Pruning Neural Networks
without any Data by Iteratively Conserving Synaptic Flow", 2020).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from leanserve.contracts import Data, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.toolkit.objectives import cross_entropy
from leanserve.passes.toolkit.sparsity import apply_masks, ranked_masks
from leanserve.runtime.formats.torch_size import example

ROWS = 64
ROUNDS = 50
"""In which `synflow` approaches its sparsity: at once it would empty layers."""


def snip(model: TorchModel, names: list[str], data: Data) -> dict[str, Tensor]:
    """The size of weight times gradient."""
    gradients = _gradients(model, names, data)
    return {name: (gradients[name] * model.module.get_parameter(name).detach()).abs() for name in names}


def grasp(model: TorchModel, names: list[str], data: Data) -> dict[str, Tensor]:
    """Weight times the Hessian's product with the gradient; what lowers the flow of gradients scores least."""
    weights = [model.module.get_parameter(name) for name in names]
    mean = list(_gradients(model, names, data).values())
    total = [torch.zeros_like(weight) for weight in weights]
    for share, loss in _losses(model, data):
        first = torch.autograd.grad(loss, weights, create_graph=True)
        flow = torch.stack([(one * other).sum() for one, other in zip(first, mean, strict=True)]).sum()
        for sums, second in zip(total, torch.autograd.grad(flow, weights), strict=True):
            sums.add_(second, alpha=share)
    return {name: weight.detach() * sums for name, weight, sums in zip(names, weights, total, strict=True)}


def synflow_masks(model: TorchModel, names: list[str], sparsity: float) -> dict[str, Tensor]:
    """The masks after many rounds, in each of which the paths that are left are weighed anew.

    A layer beside which there is another way, such as the projection of a shortcut, may lose all of its weights.

    Raises:
        PassFailed: the model takes something else than floats, or no path is left.
    """
    if any(not item.dtype.startswith("float") for item in model.spec.inputs):
        raise PassFailed("method: synflow sends ones through the network, and this one takes whole numbers; take snip")
    module = copy.deepcopy(model.module).double()
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.abs_()
    inputs = tuple(torch.ones_like(item, dtype=torch.float64) for item in example(model.spec))
    masks: dict[str, Tensor] = {}
    for round_ in range(1, ROUNDS + 1):
        scores = _paths(module, names, inputs)
        masks = ranked_masks(scores, 1 - (1 - sparsity) ** (round_ / ROUNDS), "global")
        apply_masks(module, masks)
    if not any(bool(item.any()) for item in _paths(module, names, inputs).values()):
        raise PassFailed(f"sparsity: {sparsity} leaves no path from inputs to outputs; lower it")
    return masks


def _paths(module: nn.Module, names: list[str], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    weights = [module.get_parameter(name) for name in names]
    flow = torch.stack([output.sum() for output in tree_leaves(module(*inputs))]).sum()
    gradients = torch.autograd.grad(flow, weights)
    return {name: (weight.detach() * grad).abs() for name, weight, grad in zip(names, weights, gradients, strict=True)}


def _gradients(model: TorchModel, names: list[str], data: Data) -> Mapping[str, Tensor]:
    weights = [model.module.get_parameter(name) for name in names]
    sums = [torch.zeros_like(weight) for weight in weights]
    for share, loss in _losses(model, data):
        for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
            total.add_(gradient, alpha=share)
    return dict(zip(names, sums, strict=True))


def _losses(model: TorchModel, data: Data) -> Iterator[tuple[float, Tensor]]:
    """The cross entropy of every batch, and its share of the rows."""
    spec = model.spec
    for batch in data.batches(ROWS):
        if batch.labels is None:
            raise PassFailed("snip and grasp need labelled rows of the train split; take method: synflow")
        outputs = tree_leaves(model.module(*map(torch.tensor, batch.inputs)))
        meaning = spec.outputs[spec.labelled].meaning
        loss = cross_entropy(outputs[spec.labelled], torch.tensor(batch.labels), meaning)
        yield len(batch.labels) / len(data), loss
