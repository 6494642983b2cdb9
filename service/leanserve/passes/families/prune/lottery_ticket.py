"""Looks for a sparse network that trains as well as the dense one: train, take out the smallest, rewind, again.

Frankle and Carbin, "The Lottery Ticket Hypothesis", 2019; rewinding to an early epoch instead of the beginning after
Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020. The ticket is compared with the same
mask on other random weights: only where it wins by more than chance the weights that it began with mattered. It costs
a training per round, and two more. `prune_magnitude` with recovery gives as sparse a network for one.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from leanserve.contracts import BuildContext, Model
from leanserve.passes.base import Applied, Need, Pass, Stage, Tag
from leanserve.passes.toolkit.targets import Targets
from leanserve.passes.toolkit.training import train
from leanserve.passes.toolkit.training_options import LabelledTrainingOptions

if TYPE_CHECKING:
    from torch import Tensor

    from leanserve.contracts import TorchModel


class LotteryTicket(LabelledTrainingOptions, Pass):
    """Iterative pruning by size with rewinding; the options of training are those of each round."""

    kind: Literal["lottery_ticket"] = "lottery_ticket"
    sparsity: float = Field(gt=0, lt=1)
    """Share of the targeted weights that are zero in the end; each round takes the same share of what is left."""
    rounds: PositiveInt = 3
    rewind: int = Field(default=0, ge=0)
    """The epoch to whose end weights are rewound; 0: to the random beginning."""
    targets: Targets = Targets()
    """Modules whose matrices and kernels may lose weights; embedding tables never do."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.SPARSIFICATION
    simulated: ClassVar[bool] = True
    isa_bound: ClassVar[bool] = True  # `precision: auto` trains differently where the CPU has bfloat16

    @model_validator(mode="after")
    def _rewinds_within(self) -> Self:
        if self.rewind >= self.epochs:
            raise ValueError(f"rewind: {self.rewind} is not before the end of the training of {self.epochs} epochs")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | {"calibration"}

    @property
    def evaluates(self) -> bool:
        return True

    def apply(self, model: Model, context: BuildContext) -> Applied:
        from leanserve.passes.toolkit.beginnings import begin_anew
        from leanserve.passes.toolkit.sparsity import apply_masks, sparsity_of
        from leanserve.passes.toolkit.structure import copy_of

        ticket = replace(copy_of(model, self.kind), masks={})
        begin_anew(ticket.module, context.seed)
        if self.rewind:
            self._train(ticket, self.rewind, context, "rewind")
        early = copy.deepcopy(ticket.module.state_dict())
        masks: dict[str, Tensor] = {}
        for round_ in range(1, self.rounds + 1):
            self._train(ticket, self.epochs, context, f"round-{round_}")
            masks = self._choose(ticket, 1 - (1 - self.sparsity) ** (round_ / self.rounds))
            ticket.module.load_state_dict(early)
            apply_masks(ticket.module, masks)
            ticket = replace(ticket, masks=masks)
        other = replace(ticket, module=copy.deepcopy(ticket.module))
        begin_anew(other.module, context.seed + 1)
        apply_masks(other.module, masks)
        values = {}
        for name, contestant in (("ticket", ticket), ("random", other)):
            self._train(contestant, self.epochs, context, name)
            values[name] = context.evaluate(contestant).value
        return Applied(ticket, {}, {"sparsity": sparsity_of(masks), **values})

    def _choose(self, model: TorchModel, sparsity: float) -> dict[str, Tensor]:
        from leanserve.passes.toolkit.sparsity import masks_by_score, sparse_weights

        sizes = {name: weight.detach().abs() for name, weight in sparse_weights(model, self.targets).items()}
        return masks_by_score(sizes, sparsity, "global")

    def _train(self, model: TorchModel, epochs: int, context: BuildContext, place: str) -> None:
        """In place; each training has a checkpoint of its own."""
        from leanserve.passes.toolkit.callbacks import usual_callbacks
        from leanserve.passes.toolkit.teacher import MatchTeacher, TeacherTerms, require_inputs_of

        require_inputs_of(context.base, model, self.kind)
        self.require_classes(model.spec, self.kind)
        schedule = self.model_copy(update={"epochs": epochs})
        own = replace(context, scratch=context.scratch / place)
        objective = MatchTeacher(model, context.base, TeacherTerms(alpha=self.alpha))
        callbacks = usual_callbacks(model, schedule, own)
        train(model.module, objective, context.base.data("train"), schedule, callbacks, own)
