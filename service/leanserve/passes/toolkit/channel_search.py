"""Which channels a pruned model does without: the search for a target, and for the scope that harms least.

No scope is best for all networks. In a ResNet whose sums tie the channels of a whole stage, to take out those between
the two convolutions of a block harms far less (`inner`: a CIFAR ResNet-20 of half its MACs answers 55 % right before
any training, 30 % with `uniform`, 28 % with `global`); in a plain network there is nothing else to take. So all are
tried, and judged by the answers on calibration rows.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from leanserve.contracts import CandidateQuality, Data, Model, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.toolkit.activations import refit_batch_norm
from leanserve.passes.toolkit.channels import (
    ChannelGroup,
    Scope,
    blocks_of_groups,
    by_saved_time,
    nearest,
    width,
)
from leanserve.passes.toolkit.layer_times import LayerTimes, ratio_of
from leanserve.passes.toolkit.structure import differences
from leanserve.passes.toolkit.timing import inference
from leanserve.runtime.formats.torch_size import count_macs

NEAR = 0.02
"""How much farther from the goal than another a scope may end to be considered, as a share of the model."""


class ChannelSearch(ABC):
    """From the groups of a model to one that keeps a share of it."""

    scope: str
    """What decided the order of removal."""

    @abstractmethod
    def kept(self, model: TorchModel) -> float:
        """What is left of what the target counts, as a share."""

    @abstractmethod
    def nearest(self, model: TorchModel, groups: Sequence[ChannelGroup], goal: float) -> TorchModel:
        """A copy of the model without the channels that matter least, so that `kept` comes near the goal."""


class FewerChannels(ChannelSearch):
    """Towards a share of MACs or of channels, in the scope that keeps most of the base's answers."""

    def __init__(
        self,
        base: TorchModel,
        widest: Mapping[str, int],
        round_to: int,
        counted: Literal["macs", "ratio"],
        scopes: Sequence[Scope],
        judge: AgreementJudge,
    ) -> None:
        self._widest, self._round_to, self._counted = widest, round_to, counted
        self._scopes, self._judge = list(scopes), judge
        self._whole = self._size(base)
        self.scope = scopes[0]

    def kept(self, model: TorchModel) -> float:
        return self._size(model) / self._whole

    def nearest(self, model: TorchModel, groups: Sequence[ChannelGroup], goal: float) -> TorchModel:
        found = {scope: self._in(scope, model, groups, goal) for scope in self._scopes}
        made = {scope: item for scope, item in found.items() if item is not None}
        if not made:
            raise PassFailed(f"targets: no layer that scope: {self._scopes[0]} allows can be pruned; exclude fewer")
        off = {scope: abs(self.kept(item) - goal) for scope, item in made.items()}
        near = [scope for scope, distance in off.items() if distance <= min(off.values()) + NEAR]
        best = near[0] if len(near) == 1 else max(near, key=lambda scope: self._judge(model, made[scope]))
        self.scope, self._scopes = best, [best]
        return made[best]

    def _in(self, scope: Scope, model: TorchModel, groups: Sequence[ChannelGroup], goal: float) -> TorchModel | None:
        blocks = blocks_of_groups(groups, self._round_to, self._widest, scope)
        return nearest(model, blocks, self.kept, goal) if blocks else None

    def _size(self, model: TorchModel) -> int:
        return count_macs(model) if self._counted == "macs" else width(model, list(self._widest))


class AgreementJudge:
    """How much a pruned model agrees with the base, its batch norms estimated anew."""

    def __init__(self, rows: Data, evaluate: Callable[[Model], CandidateQuality]) -> None:
        self._rows, self._evaluate = rows, evaluate

    def __call__(self, whole: TorchModel, pruned: TorchModel) -> float:
        trial = replace(pruned, module=copy.deepcopy(pruned.module))
        refit_batch_norm(trial, differences(whole.module, trial.module), self._rows)
        return self._evaluate(trial).agreement


class FasterChannels(ChannelSearch):
    """Towards a share of the time of a row. A table of layers says in which order channels go; how many of them, the
    whole model says, timed beside the base: what surrounds the layers takes time, too, and is in no table."""

    scope = "latency"

    def __init__(self, base: TorchModel, widest: Mapping[str, int], round_to: int, threads: int) -> None:
        self._base, self._widest, self._round_to, self._threads = base, widest, round_to, threads
        self._times = LayerTimes(base)

    def kept(self, model: TorchModel) -> float:
        with inference(self._threads):
            return ratio_of(model, self._base)

    def nearest(self, model: TorchModel, groups: Sequence[ChannelGroup], goal: float) -> TorchModel:
        with inference(self._threads):
            blocks = by_saved_time(groups, self._round_to, self._widest, self._times)
        return nearest(model, blocks, self.kept, goal, look=0)
