"""Training that pulls whole channels to zero, so that those that go are missed less.

Wen et al., "Learning Structured Sparsity in Deep Neural Networks", 2016: the lengths of groups of weights are added to
the loss; here a group is a channel in all the layers that make or read it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from leanserve.passes.toolkit.permutations import PermutationGroup
from leanserve.passes.toolkit.training_run import Objective


class GroupLasso(Objective):
    """Another objective, and the lengths of all channels."""

    def __init__(
        self, objective: Objective, module: nn.Module, groups: Sequence[PermutationGroup], strength: float
    ) -> None:
        self._objective = objective
        self._strength = strength
        self._module = module
        self._groups = groups
        self._matrices = {name for name, weight in module.named_parameters() if weight.ndim > 1}

    def extra(self) -> nn.Module | None:
        return self._objective.extra()

    def to(self, device: str) -> None:
        self._objective.to(device)

    def loss(self, inputs: tuple[Tensor, ...], labels: Tensor | None) -> Tensor:
        lengths = [self.lengths(group).sum() for group in self._groups]
        return self._objective.loss(inputs, labels) + self._strength * torch.stack(lengths).sum()

    def lengths(self, group: PermutationGroup) -> Tensor:
        """Of every channel, [channels]."""
        parts = []
        for item in group.slices:
            if item.name in self._matrices:
                tensor = self._module.get_parameter(item.name).movedim(item.axis, 0)
                parts.append(tensor[item.places.to(tensor.device)].reshape(group.width, -1).square().sum(1))
        return (torch.stack(parts).sum(0) + 1e-12).sqrt()
