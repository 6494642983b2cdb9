"""What training on can do besides: adapters alone, batches in parts, late gradients, labels that a teacher gives."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from leanserve.contracts import TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.families.distill.distill import Distill
from leanserve.passes.toolkit.teacher import MatchTeacher, TeacherTerms
from leanserve.passes.toolkit.training_run import Objective
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

    from leanserve.passes.toolkit.training import train

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


def _two(folder: Path, work: Callable[[Path], None]) -> None:
    """Let this process and a fork of it work together, each with a folder of its own."""

    def join(rank: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
        try:
            work(folder / str(rank))
        finally:
            dist.destroy_process_group()
            (folder / "meet").unlink(missing_ok=True)

    folder.mkdir(exist_ok=True)
    other = multiprocessing.get_context("fork").Process(target=join, args=(1,))
    other.start()
    try:
        join(0)
        other.join(20)
        assert other.exitcode == 0
    finally:
        other.kill()


def test_two_processes_with_half_of_the_weights_each_train_as_one(tmp_path: Path) -> None:
    """And so does a training that both were interrupted in, from the checkpoint that one of them wrote."""
    options = {"epochs": 3, "ema": 0.5, "optimiser": "adamw", "batch_norm": "stored"}
    alone, _ = trained(tmp_path / "alone", quick(**options))
    shared = quick(**options, processes=2, split="weights")
    found: dict[str, torch.nn.Module] = {}
    held: list[int] = []

    def stopped(done: float, total: float, note: str = "") -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    def half_way(folder: Path) -> None:
        model = student()
        with pytest.raises(KeyboardInterrupt):
            shared.apply(model, context_of(tiny_base(), folder, stopped))

    def to_the_end(folder: Path) -> None:
        def seen(done: float, total: float, note: str = "") -> None:
            held.append(0)

        applied = shared.apply(student(), context_of(tiny_base(), folder, seen))
        assert isinstance(applied.model, TorchModel)
        found["made"] = applied.model.module

    _two(tmp_path / "both", half_way)
    (tmp_path / "both" / "1" / "training.safetensors").write_bytes(
        (tmp_path / "both" / "0" / "training.safetensors").read_bytes()
    )
    _two(tmp_path / "both", to_the_end)
    assert len(held) == 2 * 4, "one epoch of three was done"
    for name, weight in alone.state_dict().items():
        torch.testing.assert_close(found["made"].state_dict()[name], weight, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found["made"].get_parameter("conv.weight"), student().module.get_parameter("conv.weight"))


def test_a_share_of_a_layer_answers_and_learns_as_the_whole(tmp_path: Path) -> None:
    from leanserve.passes.toolkit.split_weights import SplitWeights, splittable

    torch.manual_seed(0)
    table, layer = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 6)
    net = torch.nn.Sequential(table, layer, torch.nn.ReLU(), torch.nn.Linear(6, 3))
    ids = torch.tensor([[0, 3, 1], [4, 4, 2]])
    net(ids).square().sum().backward()
    wanted = {name: weight.grad for name, weight in net.named_parameters() if weight.grad is not None}
    answers = net(ids).detach()

    def share(folder: Path) -> None:
        assert {type(child) for child in splittable(net)} == {torch.nn.Embedding, torch.nn.Linear}
        split = SplitWeights()
        run = _Run(net)
        split.begin(run)  # type: ignore[arg-type]
        shapes = {name: tuple(weight.shape) for name, weight in net.named_parameters()}
        assert [shapes["0.weight"], shapes["1.weight"]] == [(5, 2), (3, 4)], "half of the outputs"
        assert shapes["3.weight"] == (3, 6), "three outputs are not for two"
        torch.testing.assert_close(net(ids), answers)
        net(ids).square().sum().backward()
        rank = dist.get_rank()
        torch.testing.assert_close(net.get_parameter("0.weight").grad, wanted["0.weight"][:, 2 * rank : 2 * rank + 2])
        torch.testing.assert_close(net.get_parameter("1.weight").grad, wanted["1.weight"][3 * rank : 3 * rank + 3])
        torch.testing.assert_close(net.get_parameter("3.weight").grad, wanted["3.weight"])
        split.end(run)  # type: ignore[arg-type]
        assert not net[1]._forward_hooks
        torch.testing.assert_close(net(ids), answers)

    net.zero_grad()
    _two(tmp_path / "both", share)


class _Run:
    """What `SplitWeights` asks of a training."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.objective = module, Objective()

    def train_only(self, parameters: list[torch.nn.Parameter]) -> None:
        assert {id(item) for item in parameters} == {id(item) for item in self.module.parameters()}


def test_what_cannot_be_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="split: weights is between processes"):
        quick(split="weights")
    with pytest.raises(ValidationError, match="lora trains changes of whole weights"):
        quick(split="weights", processes=2, lora=2)
    with pytest.raises(ValidationError, match="the copy that learns along is whole in every process"):
        quick(split="weights", processes=2, mode="online", alpha=0.5)
    sparse = student()
    with torch.no_grad():
        sparse.module.get_parameter("conv.weight")[0, 0] = 0
    with pytest.raises(PassFailed, match="split: the model has weights that stay zero"):
        trained(tmp_path, quick(split="weights", processes=2), sparse)


def test_stored_statistics_stay_and_what_is_trained_answers_by_them(tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in student().module.named_buffers()}
    moved = dict(trained(tmp_path / "batch", quick())[0].named_buffers())
    kept, loss = trained(tmp_path / "stored", quick(batch_norm="stored", epochs=6))
    assert all(torch.equal(value, before[name]) for name, value in kept.named_buffers())
    assert not torch.equal(moved["norm.running_mean"], before["norm.running_mean"])
    assert not torch.equal(kept.get_parameter("norm.weight"), student().module.get_parameter("norm.weight"))
    assert loss < quick_start(tmp_path)
