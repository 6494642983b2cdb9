"""What a pass is told of a candidate: answers on the calibration split beside the base's, never on the gate's."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
from torch import nn

from leanserve.contracts import ArrayData, ModelSpec, Split, TorchModel
from leanserve.errors import PassFailed
from leanserve.evaluation import candidates
from leanserve.evaluation.candidates import CandidateEvaluator
from tiny_base import TinyBase, tiny_base


class Watched(TinyBase):
    """Notes which splits are read, and how often its model is made."""

    def data(self, split: Split, n: int | None = None, spec: ModelSpec | None = None) -> ArrayData:
        self.__dict__.setdefault("splits", set()).add(split)
        return super().data(split, n, spec)

    def model(self) -> TorchModel:
        self.__dict__["made"] = self.__dict__.get("made", 0) + 1
        return super().model()


def watched() -> Watched:
    whole = tiny_base()
    return Watched(whole.teacher, whole.inputs, whole.labels)


def negated(base: TinyBase) -> TorchModel:
    module = copy.deepcopy(base.teacher)
    head = module.get_submodule("head")
    assert isinstance(head, nn.Linear)
    for parameter in head.parameters():
        parameter.data.neg_()
    return TorchModel(module, base.spec)


@pytest.mark.usefixtures("one_thread")
def test_a_candidate_is_compared_on_the_calibration_split_with_answers_computed_once() -> None:
    base = watched()
    evaluate = CandidateEvaluator(base, 1)
    try:
        same, other = evaluate(TorchModel(base.torch_module(), base.spec)), evaluate(negated(base))
    finally:
        evaluate.close()
    assert base.labels is not None
    with torch.no_grad():
        right = float((base.teacher(torch.tensor(base.inputs[0])).argmax(1).numpy() == base.labels).mean())
    assert (same.samples, same.agreement, other.agreement) == (67, 1.0, 0.0)
    assert same.score == pytest.approx(right)
    assert other.score == pytest.approx(1 - right)
    assert (same.value, base.__dict__["splits"], base.__dict__["made"]) == (same.score, {"calibration"}, 1)


@pytest.mark.usefixtures("one_thread")
def test_without_labels_the_agreement_counts_and_rows_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "ROWS", 21)
    whole = tiny_base()
    base = TinyBase(whole.teacher, whole.inputs, None, unit=2)
    evaluate = CandidateEvaluator(base, 1)
    try:
        found = evaluate(negated(base))
    finally:
        evaluate.close()
    assert (found.samples, found.score, found.value) == (20, None, 0.0)


def test_nothing_runs_before_it_is_asked_for_and_an_empty_split_is_refused() -> None:
    before = threading.active_count()
    empty = TinyBase(tiny_base().teacher, (np.zeros((0, 1, 8, 8), np.float32),), None)
    evaluate = CandidateEvaluator(empty, 1)
    assert threading.active_count() == before
    with pytest.raises(PassFailed, match="no rows in its calibration split"):
        evaluate(empty.model())
    evaluate.close()
