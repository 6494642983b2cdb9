"""What training on can do besides: adapters alone, batches in parts, late gradients, labels that a teacher gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from leanserve.contracts import TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.families.distill.distill import Distill
from leanserve.passes.toolkit.teacher import MatchTeacher, TeacherTerms
from tiny_base import IMAGES, TinyNet, context_of, lively, tiny_base

pytestmark = pytest.mark.usefixtures("one_thread")


def quick(**options: object) -> Distill:
    return Distill.model_validate(
        {"epochs": 2, "batch": 16, "learning_rate": 0.02, "precision": "float32", "optimiser": "sgd", **options}
    )


def student() -> TorchModel:
    return TorchModel(lively(TinyNet(width=4), seed=5), IMAGES)


def trained(folder: Path, pass_: Distill, model: TorchModel | None = None) -> tuple[torch.nn.Module, float]:
    applied = pass_.apply(model or student(), context_of(tiny_base(), folder))
    assert isinstance(applied.model, TorchModel)
    return applied.model.module, applied.facts["last_loss"]


def test_adapters_change_weights_by_their_rank_and_nothing_else(tmp_path: Path) -> None:
    before, (after, loss) = student().module, trained(tmp_path, quick(lora=2, epochs=6, learning_rate=0.3))
    start = trained(tmp_path / "none", quick(lora=2, epochs=1, learning_rate=1e-9))[1]
    assert loss < 0.9 * start
    assert set(after.state_dict()) == set(before.state_dict())
    for name, weight in before.named_parameters():
        change = (after.get_parameter(name) - weight).detach()
        if name in {"conv.weight", "stem.weight"}:
            assert torch.linalg.matrix_rank(change.flatten(1), rtol=1e-3) <= 2
            assert change.abs().max() > 1e-4
        else:
            assert change.abs().max() == 0, name  # the head has two outputs, no more than the rank


def test_adapters_resume_to_the_same_weights(tmp_path: Path) -> None:
    def interrupt(done: float, total: float, note: str = "") -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    pass_ = quick(lora=2, late=1, epochs=4, ema=0.9)
    with pytest.raises(KeyboardInterrupt):
        pass_.apply(student(), context_of(tiny_base(), tmp_path, interrupt))
    resumed, whole = (trained(folder, pass_)[0].state_dict() for folder in (tmp_path, tmp_path / "whole"))
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_adapters_do_not_fill_what_masks_keep_at_zero(tmp_path: Path) -> None:
    sparse = student()
    with torch.no_grad():
        sparse.module.get_parameter("conv.weight")[0, 0] = 0
    with pytest.raises(PassFailed, match="lora: the model has weights that stay zero"):
        trained(tmp_path, quick(lora=2), sparse)
    with pytest.raises(PassFailed, match="lora: no linear layer or convolution has a rank above 64"):
        trained(tmp_path, quick(lora=64))


def test_a_batch_in_parts_is_the_same_step() -> None:
    def weights(**options: object) -> list[torch.Tensor]:
        module = student().module
        for child in module.modules():
            if isinstance(child, torch.nn.BatchNorm2d):  # whose statistics are those of a part
                child.momentum = 0.0
                child.train = lambda mode=True, child=child: child  # type: ignore[method-assign, misc]
        return list(_train(module, quick(**options)).parameters())

    for whole, parted in zip(weights(), weights(parts=3), strict=True):
        torch.testing.assert_close(whole, parted, rtol=1e-4, atol=1e-5)


def _train(module: torch.nn.Module, options: Distill) -> torch.nn.Module:
    """Labels alone, so that nothing copies the module."""
    from tempfile import TemporaryDirectory

    from leanserve.passes.toolkit.training import Objective, train

    class Labels(Objective):
        def loss(self, inputs: tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> torch.Tensor:
            assert labels is not None
            return torch.nn.functional.cross_entropy(module(*inputs), labels)

    with TemporaryDirectory() as folder:
        context = context_of(tiny_base(), Path(folder))
        train(module, Labels(), context.base.data("train"), options, [], context)
    return module


def test_late_gradients_are_those_of_earlier_steps(tmp_path: Path) -> None:
    prompt, late = trained(tmp_path / "a", quick(epochs=6)), trained(tmp_path / "b", quick(epochs=6, late=3))
    assert not torch.equal(prompt[0].get_parameter("head.weight"), late[0].get_parameter("head.weight"))
    assert late[1] < quick_start(tmp_path)
    untouched = trained(tmp_path / "c", quick(epochs=1, late=4))[0]  # four steps an epoch: no gradient is due yet
    assert torch.equal(untouched.get_parameter("head.weight"), student().module.get_parameter("head.weight"))


def quick_start(tmp_path: Path) -> float:
    """The loss before anything is learned."""
    return trained(tmp_path / "start", quick(epochs=1, learning_rate=1e-9))[1]


def test_a_sure_teacher_gives_labels_and_an_unsure_one_none() -> None:
    model, base = student(), tiny_base()
    inputs = (torch.from_numpy(base.inputs[0]),)
    answers = base.torch_module()(*inputs).detach()
    chances, labels = answers.softmax(1).max(1)
    threshold = float(chances.median())
    sure = chances >= threshold
    given = model.module(*inputs)
    hard = torch.nn.functional.cross_entropy(given[sure], labels[sure], reduction="sum") / len(given)
    match = MatchTeacher(model, base, TeacherTerms(alpha=1.0, pseudo_labels=threshold))
    torch.testing.assert_close(match.loss(inputs, None), hard)
    never = MatchTeacher(model, base, TeacherTerms(alpha=1.0, pseudo_labels=1.0))
    assert chances.max() < 1
    assert never.loss(inputs, None) == 0
    unlabelled = quick(alpha=0.5, pseudo_labels=0.9)
    assert "labels" not in unlabelled.needs
    assert "labels" in quick(alpha=0.5).needs
    with pytest.raises(ValidationError, match="pseudo_labels are labels, whose weight is alpha"):
        quick(pseudo_labels=0.9)


def test_one_of_one_process_trains_as_one_alone(tmp_path: Path) -> None:
    """Gloo with one member; two are for `make soak`."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        shared = _train(student().module, quick(processes=2))
    finally:
        dist.destroy_process_group()
    alone = _train(student().module, quick())
    for ours, theirs in zip(shared.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
