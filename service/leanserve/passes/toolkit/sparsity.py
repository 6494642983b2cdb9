"""Which single weights go: scores to masks, all at once or more and more while the model trains.

A mask says per weight whether it stays. Layers differ in what they can spare, so that a share of zeros can be asked of
every layer, of the model as a whole, or of each layer by its shape (`erk`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from leanserve.contracts import TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.toolkit.masks import KeepMasks
from leanserve.passes.toolkit.targets import Targets
from leanserve.passes.toolkit.training_run import TrainingRun

SparsityScope: TypeAlias = Literal["local", "global", "erk"]
UPDATES = 20
"""How often a growing sparsity chooses anew: between two choices weights have time to take over."""


def sparse_weights(model: TorchModel, targets: Targets) -> dict[str, nn.Parameter]:
    """The matrices and kernels that may lose weights, by name: those of targeted modules, without embedding tables.

    A table is read by rows, not multiplied; a layer that shares its weight with one keeps it whole.
    """
    tables = {id(child.weight) for child in model.module.modules() if isinstance(child, nn.Embedding)}
    holders = targets.select(model.module).values()
    chosen = {id(weight) for child in holders for weight in child.parameters(recurse=False) if weight.ndim > 1}
    names = model.module.named_parameters()
    found = {name: weight for name, weight in names if id(weight) in chosen - tables}
    if not found:
        raise PassFailed("targets: the layers that are named have no matrices or kernels; name others")
    return found


def layers_of(weights: Collection[str]) -> list[str]:
    """The names of the modules that hold these parameters."""
    return [name.rpartition(".")[0] for name in weights]


def lowest(scores: Tensor, count: int) -> Tensor:
    """A mask that is `False` for the `count` lowest scores; among equals the first go."""
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().argsort(stable=True)[:count]] = False
    return mask.reshape(scores.shape)


def masks_by_score(scores: Mapping[str, Tensor], sparsity: float, scope: SparsityScope) -> dict[str, Tensor]:
    """The masks that leave the share `sparsity` of all weights at zero, those with the lowest scores.

    Raises:
        PassFailed: nothing would be left of a layer.
    """
    masks = ranked_masks(scores, sparsity, scope)
    for name, mask in masks.items():
        if not bool(mask.any()):
            raise PassFailed(
                f"sparsity: {sparsity:.3g} leaves nothing of '{name}'; lower it, exclude it or take scope: erk"
            )
    return masks


def ranked_masks(scores: Mapping[str, Tensor], sparsity: float, scope: SparsityScope) -> dict[str, Tensor]:
    """As `masks_by_score`, whatever is left of a layer."""
    if scope == "global":
        ranked = lowest(torch.cat([item.flatten() for item in scores.values()]), _count(sparsity, scores.values()))
        parts = torch.split(ranked, [item.numel() for item in scores.values()])
        return {name: part.reshape(scores[name].shape) for name, part in zip(scores, parts, strict=True)}
    density = dict.fromkeys(scores, 1 - sparsity) if scope == "local" else erk_density(scores, 1 - sparsity)
    return {name: lowest(item, _count(1 - density[name], [item])) for name, item in scores.items()}


def erk_density(shaped: Mapping[str, Tensor], density: float) -> dict[str, float]:
    """By name the share of weights that stay: in proportion to (sum of its axes) / (product of its axes), at most 1.

    Small layers keep more (the Erdos-Renyi kernel of Evci et al., "Rigging the Lottery", 2020).
    """
    raw = {name: sum(item.shape) / item.numel() for name, item in shaped.items()}
    budget = density * sum(item.numel() for item in shaped.values())
    dense: set[str] = set()
    while True:
        open_ = [name for name in shaped if name not in dense]
        left = budget - sum(shaped[name].numel() for name in dense)
        scale = left / sum(raw[name] * shaped[name].numel() for name in open_)
        full = {name for name in open_ if scale * raw[name] > 1}
        if not full:
            return {name: 1.0 if name in dense else scale * raw[name] for name in shaped}
        dense |= full


def sparsity_of(masks: Mapping[str, Tensor]) -> float:
    """The share of weights that stay zero."""
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


@torch.no_grad()
def apply_masks(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set to zero what the masks leave out."""
    for name, mask in masks.items():
        module.get_parameter(name).masked_fill_(~mask, 0)


class GrowingMasks(KeepMasks):
    """Sparsity that grows while the model trains: the share 1 - (1 - t)^3 of it at the share t of the ramp.

    Zhu and Gupta, "To Prune, or Not to Prune", 2017: much at first, when there is much to spare. `choose` gives the
    masks for a share of the final sparsity, from the weights as they are.
    """

    def __init__(
        self, choose: Callable[[float], Mapping[str, Tensor]], ramp: float, kept: Mapping[str, Tensor]
    ) -> None:
        super().__init__(kept)
        self._choose = choose
        self._ramp = ramp

    def end_step(self, run: TrainingRun) -> None:
        last = max(1, round(self._ramp * run.steps))
        every = max(1, last // UPDATES)
        if run.step == last or (run.step < last and run.step % every == 0):
            chosen = self._choose(1 - (1 - run.step / last) ** 3)
            self.masks = {**self.masks, **chosen}
        super().end_step(run)


def _count(share: float, items: Collection[Tensor]) -> int:
    return round(share * sum(item.numel() for item in items))
