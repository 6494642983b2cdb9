"""Removes whole channels, so that every kernel stays dense and the model really gets smaller and faster.

Channels are ranked by `l1` or `l2` norm (Li et al., "Pruning Filters for Efficient ConvNets", 2017), by the batch-norm
scale (Liu et al., "Network Slimming", 2017), by `taylor`, the first-order change of the loss (Molchanov et al.,
"Importance Estimation for Neural Network Pruning", 2019), or `hessian`, the second-order one (LeCun et al., "Optimal
Brain Damage", 1990), by their distance from all other filters (`fpgm`; He et al. 2019), by norms that layers can be
compared by (`lamp`; Lee et al. 2021) or after training that pulls whole channels to zero (`group_lasso`; Wen et al.
2016). Groups of tied channels come from torch-pruning (2023).

It buys latency nearly in proportion: a residual CNN with half its MACs is 1.6 times as fast on a CPU in float32, with
counts in multiples of 16, and 1.3 times without. It costs accuracy until `distill` has recovered it: gate only then.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, model_validator

from leanserve.contracts import BuildContext, Json, Model
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied, Need, Pass, Stage, Tag
from leanserve.passes.toolkit.targets import Targets
from leanserve.passes.toolkit.training import train
from leanserve.passes.toolkit.training_options import TrainingOptions

if TYPE_CHECKING:
    from torch import nn

    from leanserve.contracts import TorchModel
    from leanserve.passes.toolkit.channel_search import ChannelSearch
    from leanserve.passes.toolkit.channels import ChannelGroup, Scope
    from leanserve.passes.toolkit.training_run import Objective

logger = logging.getLogger(__name__)

TOLERANCE = 0.1
"""How far from its target, as a share of the model's MACs or channels, a pruned model may end."""
TOLD = 0.02
"""How far it may end without a warning."""


def _in_float32(options: TrainingOptions) -> TrainingOptions:
    """Artifacts of this pass are the same on every CPU."""
    return options.model_copy(update={"precision": "float32"}) if options.precision == "auto" else options


class PruneChannels(Pass):
    """Structural pruning of channels; layers that make the outputs are never pruned."""

    kind: Literal["prune_channels"] = "prune_channels"
    ratio: float | None = Field(default=None, gt=0, lt=1)
    """Share of the prunable channels to remove."""
    macs: float | None = Field(default=None, gt=0, lt=1)
    """Share of the model's MACs to keep."""
    latency: float | None = Field(default=None, gt=0, lt=1)
    """Share of the model's time for one row to keep, in torch on this machine: channels go by what they matter for each
    second that they cost."""
    importance: Literal["l1", "l2", "taylor", "hessian", "bn_scale", "fpgm", "lamp", "group_lasso"] = "l2"
    """`group_lasso` trains with `recovery` before each ranking, while whole channels are pulled towards zero."""
    scope: Literal["auto", "global", "uniform", "inner"] = "auto"
    """`global` compares channels across layers, `uniform` removes the same share of every layer, `inner` of those alone
    that no sum ties to others; `auto` tries all three and takes the one that agrees most with the base."""
    round_to: int = Field(default=16, ge=1)
    """Channel counts stay multiples of it; odd counts are slower."""
    steps: int = Field(default=1, ge=1)
    """The target is approached in so many steps; importance is measured anew in each."""
    recovery: Annotated[TrainingOptions, AfterValidator(_in_float32)] | None = None
    """Training towards the base's answers between the steps; after the last one it is `distill` that trains.
    `precision: auto` is float32 here."""
    strength: PositiveFloat | None = None
    """Of `group_lasso`: the weight of the channels' lengths in the loss; 0.0001 by default."""
    samples: int = Field(default=256, ge=2)
    """Calibration rows to re-estimate batch norm, and training rows for `taylor` and `hessian`."""
    targets: Targets = Targets()
    """Layers whose outputs may be pruned."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.STRUCTURAL_REMOVAL
    libraries: ClassVar[tuple[str, ...]] = ("torch", "torch-pruning")

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if sum(value is not None for value in (self.ratio, self.macs, self.latency)) != 1:
            raise ValueError("give exactly one of ratio, macs and latency")
        if self.latency is not None and self.scope != "auto":
            raise ValueError(f"latency ranks channels by the time that they cost; drop scope: {self.scope}")
        return self

    @model_validator(mode="after")
    def _training_counts(self) -> Self:
        if self.importance == "group_lasso":
            if self.recovery is None:
                raise ValueError("group_lasso ranks channels after training that pulls them to zero; set recovery")
            return self
        if self.strength is not None:
            raise ValueError(f"strength is that of group_lasso; drop it with importance: {self.importance}")
        if self.steps == 1 and self.recovery is not None:
            raise ValueError("recovery trains between steps, and there is one; raise steps, or let distill follow")
        if self.steps > 1 and self.recovery is None and self.importance not in ("taylor", "hessian"):
            raise ValueError(
                f"steps: {self.steps} would measure '{self.importance}' of weights that nothing has trained in "
                "between, which comes to one step; set recovery, importance: taylor or hessian, or steps: 1"
            )
        return self

    @property
    def evaluates(self) -> bool:
        return self.scope == "auto" and self.latency is None

    @property
    def times(self) -> bool:
        return self.latency is not None

    @property
    def needs(self) -> frozenset[Need]:
        ranks: frozenset[Need] = frozenset({"train", "labels"}) if self._by_labels else frozenset()
        trains = frozenset() if self.recovery is None else self.recovery.training_needs
        return ranks | trains | {"calibration"}

    @property
    def processes_needed(self) -> int:
        return 1 if self.recovery is None else self.recovery.processes

    def apply(self, model: Model, context: BuildContext) -> Applied:
        from leanserve.passes.toolkit.activations import refit_batch_norm
        from leanserve.passes.toolkit.structure import copy_of, differences
        from leanserve.runtime.formats.torch_size import count_macs, count_parameters

        made = base = copy_of(model, self.kind)
        if self.importance == "group_lasso":
            made = replace(base, module=copy.deepcopy(base.module))
            self._train(made, replace(context, scratch=context.scratch / "lasso"), lasso=True)
        first = groups = self._groups(made, context)
        search = self._search(base, first, context)
        changed: dict[str, Json] = {}
        for step in range(1, self.steps + 1):
            context.progress(step - 1, self.steps, "pruning")
            groups = groups if step == 1 else self._groups(made, context)
            goal = 1 - (1 - self._target) * step / self.steps
            made = search.nearest(made, groups, goal)
            changed = differences(base.module, made.module)
            refit_batch_norm(made, changed, context.base.data("calibration", self.samples, made.spec))
            if self.recovery is not None and step < self.steps:
                place = replace(context, scratch=context.scratch / f"step-{step}")
                self._train(made, place, lasso=self.importance == "group_lasso")
        kept = search.kept(made)
        self._check(kept)
        context.progress(self.steps, self.steps, "pruned")
        facts = {
            "macs_ratio": count_macs(made) / count_macs(base),
            "parameters_ratio": count_parameters(made) / count_parameters(base),
        }
        facts |= {"latency_ratio": kept} if self.latency is not None else {}
        return Applied(
            made, {"layers": changed, "scope": search.scope, "reached": {self._aim: self._told(kept)}}, facts
        )

    def rebuild_structure(self, module: nn.Module, decisions: Mapping[str, Json]) -> nn.Module:
        from leanserve.passes.toolkit.structure import reshape

        return reshape(module, decisions["layers"])

    @property
    def _by_labels(self) -> bool:
        return self.importance in ("taylor", "hessian")

    def _train(self, model: TorchModel, context: BuildContext, *, lasso: bool) -> None:
        """Train in place what the channels that are left can learn, so that the next ranking measures it."""
        from leanserve.passes.toolkit.callbacks import usual_callbacks
        from leanserve.passes.toolkit.group_lasso import GroupLasso
        from leanserve.passes.toolkit.permutations import permutation_groups
        from leanserve.passes.toolkit.teacher import MatchTeacher, TeacherTerms

        assert self.recovery is not None
        objective: Objective = MatchTeacher(model, context.base, TeacherTerms())
        if lasso:
            objective = GroupLasso(objective, model.module, permutation_groups(model), self.strength or 1e-4)
        callbacks = usual_callbacks(model, self.recovery, context)
        data = context.base.data("train", spec=model.spec)
        train(model.module, objective, data, self.recovery, callbacks, context)

    def _groups(self, model: TorchModel, context: BuildContext) -> list[ChannelGroup]:
        """The prunable groups with their importance in `model`."""
        from torch import nn

        from leanserve.passes.toolkit.channels import channel_groups
        from leanserve.passes.toolkit.importance import importance_of

        chosen = self.targets.select(model.module, nn.Conv2d, nn.Linear).values()
        frozen = [child for child in model.module.modules() if isinstance(child, nn.Conv2d | nn.Linear)]
        frozen = [child for child in frozen if child not in set(chosen)]
        data = context.base.data("train", self.samples, model.spec) if self._by_labels else None
        criterion = "l2" if self.importance == "group_lasso" else self.importance
        return channel_groups(model, importance_of(criterion, model, data), frozen)

    def _search(self, base: TorchModel, groups: Sequence[ChannelGroup], context: BuildContext) -> ChannelSearch:
        from leanserve.passes.toolkit.channel_search import AgreementJudge, FasterChannels, FewerChannels

        widest = {group.root: len(group.scores) for group in groups}
        if not any(group.blocks(self.round_to, len(group.scores), "uniform") for group in groups):
            raise PassFailed(f"round_to: no prunable layer has more than {self.round_to} channels; lower it")
        if self.latency is not None:
            return FasterChannels(base, widest, self.round_to, context.threads)
        scopes: tuple[Scope, ...] = ("uniform", "global", "inner") if self.scope == "auto" else (self.scope,)
        judge = AgreementJudge(context.base.data("calibration", self.samples, base.spec), context.evaluate)
        return FewerChannels(base, widest, self.round_to, "ratio" if self.macs is None else "macs", scopes, judge)

    def _check(self, kept: float) -> None:
        text = (
            f"{self._aim}: {getattr(self, self._aim)} was asked for and {self._told(kept):.3f} is the nearest that was "
            f"reached; lower round_to ({self.round_to}), exclude fewer layers or ask for another value"
        )
        if kept == 1.0 or abs(kept - self._target) > TOLERANCE:
            raise PassFailed(text)
        if abs(kept - self._target) > TOLD:
            logger.warning("prune_channels.%s", text)

    def _told(self, kept: float) -> float:
        return 1 - kept if self.ratio is not None else kept

    @property
    def _aim(self) -> Literal["ratio", "macs", "latency"]:
        if self.latency is not None:
            return "latency"
        return "macs" if self.macs is not None else "ratio"

    @property
    def _target(self) -> float:
        """The share to keep."""
        return 1 - self.ratio if self.ratio is not None else self.macs or self.latency or 0.0
