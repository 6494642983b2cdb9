"""Distillation: train the compressed model to answer like the uncompressed base (Hinton, Vinyals and Dean 2015).

The teacher's soft answers say more per sample than labels do, and they need none, so unlabelled data will do. Placed
after pruning or factorisation it wins back most of what these have cost. It buys accuracy at no cost in serving; it
costs minutes of training. Masks of earlier passes are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import PositiveFloat, model_validator

from leanserve.contracts import BuildContext, Model, ModelSpec
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied, Pass, Stage, Tag
from leanserve.passes.toolkit.training import train
from leanserve.passes.toolkit.training_options import RecoveryOptions

if TYPE_CHECKING:
    from leanserve.contracts import TorchModel
    from leanserve.passes.toolkit.features import TeachExits
    from leanserve.passes.toolkit.objectives import LossKind
    from leanserve.passes.toolkit.teacher import MatchTeacher
    from leanserve.passes.toolkit.training_run import Objective


class Distill(RecoveryOptions, Pass):
    """Train on the base's answers to the train split; the teacher sees the same augmented inputs as the student."""

    kind: Literal["distill"] = "distill"
    loss: Literal["auto", "kl", "mse", "cosine"] = "auto"
    """`kl` compares class probabilities, `cosine` directions of embeddings, `mse` values, each channel relative to its
    spread in the teacher. `auto`: what suits the meaning of each output. The losses of all outputs add up."""
    temperature: PositiveFloat = 4.0
    """Softens both distributions in `kl`: the larger, the more the small probabilities count."""

    mode: Literal["offline", "online", "self"] = "offline"
    """Who teaches: the base; a copy of it that learns along, from the student and the labels (`online`); or the base
    and, for exits on the student's inner layers, the student's own last answers (`self`)."""
    weight: PositiveFloat | None = None
    """Of the exits in mode `self`, beside the answers; 0.5 by default."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.TRAINING
    isa_bound: ClassVar[bool] = True  # `precision: auto` trains differently where the CPU has bfloat16

    @model_validator(mode="after")
    def _options_of_the_mode(self) -> Self:
        if self.weight is not None and self.mode != "self":
            raise ValueError(f"weight is that of the exits in mode: self; drop it with mode: {self.mode}")
        if self.mode == "online" and not self.alpha:
            raise ValueError("without labels two networks that learn from each other may agree on anything; set alpha")
        if self.mode == "online" and self.split == "weights":
            raise ValueError(
                "in mode: online the copy that learns along is whole in every process; drop split: weights"
            )
        return self

    def apply(self, model: Model, context: BuildContext) -> Applied:
        from leanserve.passes.toolkit.callbacks import recovery_callbacks
        from leanserve.passes.toolkit.masks import masks_of
        from leanserve.passes.toolkit.structure import copy_of
        from leanserve.passes.toolkit.teacher import MatchTeacher, TeacherTerms, require_inputs_of

        student = copy_of(model, self.kind)
        student = replace(student, masks=masks_of(student))
        terms = TeacherTerms(self.loss, self.temperature, self.alpha, self.pseudo_labels)
        measures = terms.measures(student.spec)
        self._check(student.spec, measures)
        require_inputs_of(context.base, student, self.kind)
        answers = MatchTeacher(student, context.base, terms)
        callbacks = recovery_callbacks(student, self, context)
        with self._objective(answers, student, context) as objective:
            outcome = train(student.module, objective, context.base.data("train"), self, callbacks, context)
        named = {student.spec.outputs[index].name: measure for index, measure in measures.items()}
        decisions = {"loss": named, "precision": self.resolved_precision(context)}
        facts = {"first_loss": outcome.first_loss, "last_loss": outcome.last_loss, "epochs": outcome.epochs}
        return Applied(student, decisions, facts)

    @contextmanager
    def _objective(self, answers: MatchTeacher, student: TorchModel, context: BuildContext) -> Iterator[Objective]:
        """What the mode lowers; what it watches of the student is let go afterwards."""
        if self.mode == "offline":
            yield answers
        elif self.mode == "online":
            from leanserve.passes.toolkit.peers import LearnTogether

            yield LearnTogether(answers)
        else:
            exits = self._exits(answers, student, context)
            with exits.watch.watching():
                yield exits

    def _exits(self, answers: MatchTeacher, student: TorchModel, context: BuildContext) -> TeachExits:
        import torch

        from leanserve.passes.toolkit.features import TeachExits, stack_layers

        inner = stack_layers(student.module)[:-1]
        if not inner:
            raise PassFailed(
                "mode: self puts exits on the blocks of a list or sequence, and this model has fewer than two"
            )
        with torch.random.fork_rng([]):
            torch.manual_seed(context.seed)
            return TeachExits(answers, student, inner, 0.5 if self.weight is None else self.weight)

    def _check(self, spec: ModelSpec, measures: dict[int, LossKind]) -> None:
        if not measures:
            raise PassFailed("distill trains on outputs of floats, and the base gives whole numbers only")
        self.require_classes(spec, self.kind)
