"""Ways to teach beside the base's answers: features, peers, exits, several teachers, and no data at all."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from leanserve.contracts import ArrayData, Model, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.families.distill.distill import Distill
from leanserve.passes.families.distill.distill_datafree import DistillDatafree
from leanserve.passes.families.distill.distill_ensemble import DistillEnsemble
from leanserve.passes.families.distill.distill_features import DistillFeatures
from leanserve.passes.toolkit.activations import refit_batch_norm
from leanserve.passes.toolkit.features import attention, hints, relations, stack_layers
from leanserve.passes.toolkit.inversion import invent
from leanserve.passes.toolkit.teacher import Committee
from leanserve_models.residual import ResidualNet
from stacked_nets import Stacked, stacked_base
from tiny_base import TinyBase, TinyNet, context_of, lively, tiny_base

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK: dict[str, Any] = {"epochs": 3, "batch": 16, "learning_rate": 0.01, "precision": "float32"}


def small_base() -> TinyBase:
    return replace(tiny_base(rows=48), teacher=lively(ResidualNet(1, 2, widths=(8, 12), blocks=2), seed=1))


def student(base: TinyBase, widths: tuple[int, int] = (8, 12)) -> TorchModel:
    return TorchModel(lively(ResidualNet(1, 2, widths=widths, blocks=2), seed=7), base.spec)


def torch_of(model: Model) -> TorchModel:
    assert isinstance(model, TorchModel)
    return model


def hooks(module: nn.Module) -> int:
    return sum(len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules())


def feature_distance(base: TinyBase, module: nn.Module, layer: str) -> float:
    seen: list[Tensor] = []
    for network in (base.teacher, module):
        handle = network.get_submodule(layer).register_forward_hook(lambda *item: seen.append(item[-1]))
        with torch.no_grad():
            network(torch.from_numpy(base.inputs[0]))
        handle.remove()
    return float(hints(seen[1], seen[0]))


@pytest.mark.parametrize(
    ("method", "widths"), [("hints", (8, 12)), ("hints", (4, 6)), ("attention", (4, 6)), ("relations", (4, 6))]
)
def test_features_are_learned_and_nothing_is_left_of_the_learning(method: Any, widths: Any, tmp_path: Path) -> None:
    base = small_base()
    model = student(base, widths)
    names = set(model.module.state_dict())
    pass_ = DistillFeatures.model_validate({"method": method, **QUICK})
    applied = pass_.apply(model, context_of(base, tmp_path))
    made = torch_of(applied.model).module
    assert applied.facts["last_loss"] < applied.facts["first_loss"]
    assert applied.decisions["layers"] == {f"stages.{place}": f"stages.{place}" for place in range(4)}
    assert set(made.state_dict()) == names
    assert hooks(made) == hooks(base.teacher) == 0


def test_hints_bring_features_nearer_than_answers_alone(tmp_path: Path) -> None:
    base = small_base()
    made = {}
    for pass_ in (Distill.model_validate(QUICK), DistillFeatures.model_validate({"weight": 10, **QUICK})):
        applied = pass_.apply(student(base), context_of(base, tmp_path / pass_.kind))
        made[pass_.kind] = feature_distance(base, torch_of(applied.model).module, "stages.3")
    assert made["distill_features"] < 0.8 * made["distill"]


def test_losses_of_features_see_what_they_should() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 3, 3, generator=generator)
    other = torch.randn(4, 6, 3, 3, generator=generator)
    assert float(hints(x, x)) == float(attention(x, x)) == float(relations(x, x)) == 0
    assert float(hints(x * 0 + x.mean(), x)) == pytest.approx(1, abs=0.02), "the mean explains nothing"
    assert float(attention(-3 * x, x)) == pytest.approx(0, abs=1e-6), "where, not what nor how strong"
    assert float(attention(other, x)) > 0.01
    rotated = torch.einsum("ij,njhw->nihw", torch.linalg.qr(torch.randn(6, 6, generator=generator))[0], x)
    assert float(relations(5 * rotated, x)) == pytest.approx(0, abs=1e-6), "distances know no axes"
    assert float(relations(other, x)) > 0.001
    line, bent = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    flat = torch.cat([line, torch.zeros(3, 1)], 1)
    # cosines at the three rows: 1, -1, 1 on the line; at the bend 0.71, 0, 0.71. Each stands twice among 27.
    cosines = 2 * sum(0.5 * (a - b) ** 2 for a, b in ((1, 0.5**0.5), (-1, 0), (1, 0.5**0.5))) / 27
    apart = [torch.tensor(item) * 3 / sum(item) for item in ([1.0, 1.0, 2.0], [1.0, 1.0, 2**0.5])]
    distances = float((0.5 * (apart[0] - apart[1]).square()).mean())
    assert float(relations(flat, bent)) == pytest.approx(distances + 2 * cosines, rel=1e-4)
    thin, wide = torch.randn(4, 3, 2, 2, generator=generator), torch.randn(4, 6, 3, 3, generator=generator)
    with pytest.raises(PassFailed, match="4 positions and the teacher's 9"):
        attention(thin, wide)


def test_layers_are_paired_by_name_or_as_they_are_told(tmp_path: Path) -> None:
    base = small_base()
    context = context_of(base, tmp_path)
    told = DistillFeatures.model_validate({"layers": {"stages.1": "stages.0"}, **QUICK, "epochs": 1})
    assert told.apply(student(base), context).decisions["layers"] == {"stages.1": "stages.0"}
    wrong = DistillFeatures.model_validate({"layers": {"stages.9": "stages.0"}, **QUICK})
    with pytest.raises(PassFailed, match=r"the student has no layer 'stages.9'; it has stem"):
        wrong.apply(student(base), context)
    smaller = DistillFeatures.model_validate({"layers": {"stages.1": "stages.3"}, **QUICK})
    with pytest.raises(PassFailed, match=r"hints compare position by position: take relations"):
        smaller.apply(student(base), context)
    tiny = tiny_base()
    with pytest.raises(PassFailed, match="no list or sequence of blocks in common; name layers"):
        DistillFeatures().apply(tiny.model(), context_of(tiny, tmp_path))
    assert stack_layers(Stacked()) == [f"layers.{place}" for place in range(4)]


@pytest.mark.parametrize(
    "pass_",
    [
        DistillFeatures.model_validate(QUICK),
        Distill.model_validate({"mode": "online", "alpha": 0.5, **QUICK}),
        Distill.model_validate({"mode": "self", **QUICK}),
    ],
    ids=["features", "online", "self"],
)
def test_an_interrupted_training_resumes_with_what_it_had_beside_the_model(pass_: Any, tmp_path: Path) -> None:
    def interrupt(done: float, total: float, note: str = "") -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    base = small_base()
    with pytest.raises(KeyboardInterrupt):
        pass_.apply(student(base, (4, 6)), context_of(base, tmp_path, interrupt))
    resumed, whole = (
        torch_of(pass_.apply(student(base, (4, 6)), context_of(base, place)).model).module
        for place in (tmp_path, tmp_path / "whole")
    )
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    assert hooks(resumed) == 0


def test_a_peer_that_learns_too_teaches_something_else_than_the_base(tmp_path: Path) -> None:
    base = small_base()
    before = {name: value.clone() for name, value in base.teacher.state_dict().items()}
    made = {
        mode: torch_of(
            Distill.model_validate({"mode": mode, "alpha": 0.1, **QUICK, "epochs": 8})
            .apply(student(base), context_of(base, tmp_path / mode))
            .model
        ).module
        for mode in ("offline", "online")
    }
    labels, images = torch.as_tensor(base.labels), torch.from_numpy(base.inputs[0])
    with torch.no_grad():
        right = {mode: float((module(images).argmax(1) == labels).float().mean()) for mode, module in made.items()}
    assert right["online"] > right["offline"], "a random base is wrong, and a peer learns from the labels"
    assert all(torch.equal(value, before[name]) for name, value in base.teacher.state_dict().items())


def test_exits_change_the_layers_before_them(tmp_path: Path) -> None:
    base = small_base()
    applied = {
        weight: Distill.model_validate({"mode": "self", "weight": weight, **QUICK}).apply(
            student(base), context_of(base, tmp_path / str(weight))
        )
        for weight in (1e-9, 1.0)
    }
    weak, strong = (torch_of(item.model).module.state_dict() for item in applied.values())
    assert not torch.allclose(weak["stages.0.conv1.weight"], strong["stages.0.conv1.weight"], atol=1e-3)
    assert set(strong) == set(base.teacher.state_dict())
    with pytest.raises(PassFailed, match=r"mode: self .* fewer than two"):
        Distill(mode="self").apply(TorchModel(lively(TinyNet(), 1), base.spec), context_of(base, tmp_path))
    stacked = stacked_base()
    Distill.model_validate({"mode": "self", **QUICK, "epochs": 1}).apply(stacked.model(), context_of(stacked, tmp_path))


@pytest.mark.parametrize(
    ("options", "text"),
    [({"mode": "online"}, "set alpha"), ({"weight": 1.0}, "weight is that of the exits in mode: self")],
)
def test_options_of_another_mode_are_refused(options: Any, text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        Distill.model_validate(options)


def test_a_committee_answers_with_the_mean_of_what_answers_mean() -> None:
    base = tiny_base()
    teachers = [lively(TinyNet(), seed=seed) for seed in (1, 2)]
    images = torch.from_numpy(base.inputs[0])
    with torch.no_grad():
        mean = torch.stack([teacher(images).softmax(1) for teacher in teachers]).mean(0)
        [answers] = Committee(teachers, base.spec)(images)
    torch.testing.assert_close(answers.softmax(1), mean)
    assert float(answers.exp().sum(1).log().abs().max()) < 1e-5


def test_a_student_of_several_teachers_is_between_them(tmp_path: Path) -> None:
    base = tiny_base()
    teachers = [TorchModel(lively(TinyNet(), seed=seed), base.spec) for seed in (1, 2)]
    pass_ = DistillEnsemble.model_validate({**QUICK, "epochs": 12, "temperature": 1})
    made = torch_of(pass_.join([base.model(), *teachers], context_of(base, tmp_path)).model).module
    images = torch.from_numpy(base.inputs[0])
    with torch.no_grad():
        [wanted] = Committee([item.module for item in teachers], base.spec)(images)
        apart = [
            float((wanted.exp() * (wanted - module(images).log_softmax(1))).sum(1).mean())
            for module in (made, *(item.module for item in teachers))
        ]
    assert apart[0] < 0.7 * min(apart[1:])
    with pytest.raises(PassFailed, match="the student and its teachers as parents, and the variant has one"):
        pass_.join([base.model()], context_of(base, tmp_path))


def test_inputs_are_invented_until_batch_norms_know_them(tmp_path: Path) -> None:
    base = small_base()
    fitted = base.model()
    refit_batch_norm(fitted, ["stem.0"], base.data("train"))
    base = replace(base, teacher=fitted.module)
    context = context_of(base, tmp_path)
    data, (first, last) = invent(base.torch_module(), context, rows=10, batch=8, steps=60)
    assert isinstance(data, ArrayData)
    assert data.inputs[0].shape == (10, 1, 8, 8)
    assert last < 0.85 * first
    assert math.isfinite(last)
    again, _ = invent(base.torch_module(), context, rows=10, batch=8, steps=60)
    assert (again.inputs[0] == data.inputs[0]).all()


def test_a_student_learns_without_any_data(tmp_path: Path) -> None:
    class NoData(TinyBase):
        def data(self, *_: Any, **__: Any) -> ArrayData:
            raise AssertionError("there is none")

    with_data = small_base()
    base = NoData(with_data.teacher, (), None, with_data.spec)
    pass_ = DistillDatafree.model_validate({**QUICK, "rows": 64, "inversion_steps": 20, "epochs": 6})
    assert pass_.needs == {"batches"}
    applied = pass_.apply(student(base), context_of(base, tmp_path))
    assert applied.facts["last_loss"] < 0.5 * applied.facts["first_loss"]
    images = torch.from_numpy(with_data.inputs[0])
    with torch.no_grad():
        wanted = base.teacher(images).log_softmax(1)
        apart = [
            float((wanted.exp() * (wanted - module(images).log_softmax(1))).sum(1).mean())
            for module in (torch_of(applied.model).module, student(base).module)
        ]
    assert apart[0] < 0.7 * apart[1], "nearer on images that it has never seen"
    assert hooks(base.teacher) == 0


def test_what_cannot_do_without_data_says_so(tmp_path: Path) -> None:
    stacked = stacked_base()
    with pytest.raises(PassFailed, match="batch norms remember, and this base has none; take distill"):
        DistillDatafree().apply(stacked.model(), context_of(stacked, tmp_path))
    with pytest.raises(ValidationError, match="does without data; drop it"):
        DistillDatafree(patience=1)
