from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from leanserve.artifacts.manifest import OutputFidelity
from leanserve.contracts import ModelSpec, TensorSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.evaluation.fidelity import fidelity
from leanserve.passes.families.distill.distill import Distill
from leanserve.passes.toolkit.teacher import require_inputs_of
from tiny_base import IMAGES, TinyBase, TinyNet, context_of, lively, tiny_base

EMBEDDINGS = replace(IMAGES, outputs=(TensorSpec("embedding", "float32", (2,), meaning="embedding"),), labels=())


def quick(**options: object) -> Distill:
    return Distill.model_validate({"epochs": 8, "batch": 16, "learning_rate": 0.02, "precision": "float32", **options})


def student(spec: ModelSpec = IMAGES) -> TorchModel:
    return TorchModel(lively(TinyNet(width=4), seed=5), spec)


def distance(base: TinyBase, module: nn.Module, measure: str) -> float:
    images = torch.from_numpy(base.inputs[0])
    with torch.no_grad():
        wanted, given = base.torch_module()(images), module(images)
    if measure == "cosine":
        return float(1 - nn.functional.cosine_similarity(given, wanted).mean())
    if measure == "mse":
        return float((given - wanted).square().mean())
    return float((wanted.softmax(1) * (wanted.log_softmax(1) - given.log_softmax(1))).sum(1).mean())


@pytest.mark.parametrize("measure", ["kl", "mse", "cosine"])
def test_the_student_comes_nearer_to_the_teacher(tmp_path: Path, measure: str) -> None:
    base, model = tiny_base(), student()
    applied = quick(loss=measure).apply(model, context_of(base, tmp_path))
    assert isinstance(applied.model, TorchModel)
    assert distance(base, applied.model.module, measure) < 0.5 * distance(base, model.module, measure)
    assert applied.facts["last_loss"] < applied.facts["first_loss"]
    assert applied.decisions == {"loss": {"logits": measure}, "precision": "float32"}


def test_the_given_model_is_left_as_it_was_and_the_result_loads_into_its_structure(tmp_path: Path) -> None:
    model = student()
    before = copy.deepcopy(model.module.state_dict())
    applied = quick(epochs=1).apply(model, context_of(tiny_base(), tmp_path))
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert isinstance(applied.model, TorchModel)
    assert not applied.model.module.training
    again = quick().rebuild_structure(lively(TinyNet(width=4), seed=9), applied.decisions)
    again.load_state_dict(applied.model.module.state_dict(), strict=True)
    images = torch.from_numpy(tiny_base().inputs[0])
    assert torch.equal(again(images), applied.model.module(images))


def test_an_interrupted_distillation_resumes_to_the_same_weights(tmp_path: Path) -> None:
    def interrupt(done: float, total: float, note: str = "") -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    pass_, base = quick(augment="affine"), tiny_base()
    with pytest.raises(KeyboardInterrupt):
        pass_.apply(student(), context_of(base, tmp_path, interrupt))
    resumed, whole = (
        pass_.apply(student(), context_of(base, folder)).model for folder in (tmp_path, tmp_path / "whole")
    )
    assert isinstance(resumed, TorchModel)
    assert isinstance(whole, TorchModel)
    for name, value in resumed.module.state_dict().items():
        assert torch.equal(value, whole.module.state_dict()[name]), name


def test_progress_is_told_with_epoch_and_loss(tmp_path: Path) -> None:
    told: list[tuple[float, float, str]] = []
    context = context_of(tiny_base(), tmp_path, lambda done, total, note="": told.append((done, total, note)))
    quick(epochs=2).apply(student(), context)
    assert [done for done, _, _ in told] == list(range(1, 9))
    assert {total for _, total, _ in told} == {8}
    assert told[-1][2].startswith("epoch 2/2, loss ")


def test_alpha_adds_the_hard_labels(tmp_path: Path) -> None:
    base = tiny_base()
    right = quick(alpha=1.0, epochs=15).apply(student(), context_of(base, tmp_path / "labels")).model
    like = quick(alpha=0.0, epochs=15).apply(student(), context_of(base, tmp_path / "teacher")).model
    assert isinstance(right, TorchModel)
    assert isinstance(like, TorchModel)
    images = torch.from_numpy(base.inputs[0])
    accuracy = [(model.module(images).argmax(1).numpy() == base.labels).mean() for model in (right, like)]
    assert accuracy[0] > 0.95 > accuracy[1], "the random teacher is often wrong, the labels never"


def test_a_base_without_classes_is_distilled_by_cosine(tmp_path: Path) -> None:
    base = replace(tiny_base(), labels=None, spec=EMBEDDINGS)
    model = student(EMBEDDINGS)
    applied = quick().apply(model, context_of(base, tmp_path))
    assert isinstance(applied.model, TorchModel)
    assert applied.decisions["loss"] == {"embedding": "cosine"}
    assert distance(base, applied.model.module, "cosine") < 0.3 < distance(base, model.module, "cosine")


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first(values), self.second(values)


class Regressor(nn.Module):
    """A hidden layer, and columns of very different width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, width), nn.Linear(width, 2)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        columns: torch.Tensor = self.head(self.hidden(values).tanh()) * torch.tensor([300.0, 1.0])
        return columns


class TwoTasks(nn.Module):
    """Probabilities of classes, a regression and the number of the class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classes, self.columns = nn.Linear(4, 3), Regressor(width)

    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        chances = self.classes(values).softmax(1)
        return self.columns(values), chances, chances.argmax(1)


COLUMNS = TensorSpec("columns", "float32", (2,))
CHANCES = TensorSpec("chances", "float32", (3,), meaning="probabilities")
ROWS = np.random.default_rng(0).standard_normal((128, 4)).astype(np.float32)


def distances(base: TinyBase, model: TorchModel) -> list[OutputFidelity]:
    with torch.no_grad():
        ours, theirs = (module(torch.from_numpy(ROWS)) for module in (model.module, base.torch_module()))
    outputs = [found if isinstance(found, tuple) else (found,) for found in (ours, theirs)]
    answers = [tuple(item.numpy() for item in found) for found in outputs]
    return list(fidelity(answers[0], answers[1], base.spec.outputs))


@pytest.mark.usefixtures("one_thread")
def test_auto_lowers_the_error_of_a_regressor_in_its_narrow_column_too(tmp_path: Path) -> None:
    spec = ModelSpec((TensorSpec("values", "float32", (4,)),), (COLUMNS,))
    base = TinyBase(lively(Regressor(8), seed=1), (ROWS,), None, spec)
    model = TorchModel(lively(Regressor(6), seed=2), spec)
    applied = quick(epochs=60).apply(model, context_of(base, tmp_path))
    assert isinstance(applied.model, TorchModel)
    assert applied.decisions["loss"] == {"columns": "mse"}
    [before], [after] = distances(base, model), distances(base, applied.model)
    assert (after.error or 0) < 0.5 * (before.error or 0)


@pytest.mark.usefixtures("one_thread")
def test_auto_trains_every_output_by_its_meaning(tmp_path: Path) -> None:
    outputs = (COLUMNS, CHANCES, TensorSpec("number", "int64", ()))
    spec = ModelSpec((TensorSpec("values", "float32", (4,)),), outputs, ("a", "b", "c"), labelled=1)
    base = TinyBase(lively(TwoTasks(8), seed=1), (ROWS,), np.arange(128) % 3, spec)
    model = TorchModel(lively(TwoTasks(6), seed=2), spec)
    applied = quick(epochs=60, alpha=0.01).apply(model, context_of(base, tmp_path))
    assert isinstance(applied.model, TorchModel)
    assert applied.decisions["loss"] == {"columns": "mse", "chances": "kl"}, "whole numbers have no gradient"
    before, after = distances(base, model), distances(base, applied.model)
    assert (after[0].error or 0) < 0.5 * (before[0].error or 0)
    assert (after[1].kl or 0) < 0.5 * (before[1].kl or 0)


def test_whole_numbers_alone_cannot_be_trained(tmp_path: Path) -> None:
    spec = ModelSpec((TensorSpec("values", "float32", (4,)),), (TensorSpec("number", "int64", ()),))
    base = TinyBase(TwoTasks(2), (ROWS,), None, spec)
    with pytest.raises(PassFailed, match="distill trains on outputs of floats, and the base gives whole numbers only"):
        quick().apply(TorchModel(TwoTasks(2), spec), context_of(base, tmp_path))


def test_every_output_is_matched(tmp_path: Path) -> None:
    spec = ModelSpec(
        (TensorSpec("values", "float32", (4,)),), (TensorSpec("a", "float32", (2,)), TensorSpec("b", "float32", (3,)))
    )
    values = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    base = TinyBase(lively(TwoHeads(), seed=1), (values,), None, spec)
    applied = quick(loss="mse", epochs=100).apply(
        TorchModel(lively(TwoHeads(), seed=2), spec), context_of(base, tmp_path)
    )
    assert isinstance(applied.model, TorchModel)
    given, wanted = applied.model.module(torch.from_numpy(values)), base.torch_module()(torch.from_numpy(values))
    for ours, theirs in zip(given, wanted, strict=True):
        assert (ours - theirs).abs().max() < 0.1


def test_zeros_of_a_sparse_student_survive(tmp_path: Path) -> None:
    model = student()
    with torch.no_grad():
        model.module.get_parameter("conv.weight")[0] = 0
    applied = quick(epochs=2).apply(model, context_of(tiny_base(), tmp_path))
    assert isinstance(applied.model, TorchModel)
    assert applied.model.module.get_parameter("conv.weight")[0].count_nonzero() == 0


def test_what_does_not_fit_the_base_is_refused_before_training(tmp_path: Path) -> None:
    vectors = ModelSpec((TensorSpec("values", "float32", (4,)),), IMAGES.outputs, IMAGES.labels)
    context = context_of(tiny_base(), tmp_path)
    with pytest.raises(PassFailed, match=r"distill.alpha is 0.5, but the base has no classes"):
        quick(alpha=0.5).apply(student(EMBEDDINGS), context)
    with pytest.raises(PassFailed, match=r"augment is 'shift', but no input is an image .*values \[4\]"):
        quick(augment="shift").apply(student(vectors), context_of(replace(tiny_base(), spec=vectors), tmp_path))
    with pytest.raises(PassFailed, match=r"alpha is 0.5, but the train split has no labels"):
        quick(alpha=0.5).apply(student(), context_of(replace(tiny_base(), labels=None), tmp_path))


def test_what_the_base_has_learned_of_its_values_makes_no_other_input(tmp_path: Path) -> None:
    [image] = IMAGES.inputs
    known = replace(tiny_base(), spec=replace(IMAGES, inputs=(replace(image, values=(0, 9)),)))
    require_inputs_of(known, student(), "distill")
    wider = replace(student().spec, inputs=(replace(image, shape=(1, 9, 9)),))
    with pytest.raises(PassFailed, match="whose inputs were changed"):
        require_inputs_of(known, replace(student(), spec=wider), "distill")


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"alpha": 1.1}, {"temperature": 0}, {"warmup": 1}, {"lr": 1}])
def test_wrong_options_are_refused_when_the_config_is_read(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Distill.model_validate(wrong)


class Ruled(nn.Module):
    """Rules out its first class: a logit of -inf."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(image)
        return nn.functional.pad(logits, (1, 0), value=-torch.inf)


@pytest.mark.parametrize("measure", ["kl", "mse", "cosine"])
def test_classes_that_the_teacher_rules_out_do_not_disturb(tmp_path: Path, measure: str) -> None:
    base, spec = tiny_base(), replace(IMAGES, labels=("none", *IMAGES.labels))
    ruled = TinyBase(Ruled(base.teacher), base.inputs, base.labels, spec)
    applied = quick(loss=measure, epochs=4).apply(
        TorchModel(Ruled(student().module), spec), context_of(ruled, tmp_path)
    )
    assert 0 < applied.facts["last_loss"] < applied.facts["first_loss"]
