"""Sparsity that is decided before a training, by one, or by many: what is scored, what stays, what is compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from leanserve.contracts import ArrayData, Model, ModelSpec, TensorSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.families.distill.distill import Distill
from leanserve.passes.families.prune.lottery_ticket import LotteryTicket
from leanserve.passes.families.prune.prune_at_init import PruneAtInit
from leanserve.passes.families.prune.prune_movement import PruneMovement
from leanserve.passes.toolkit.initial_scores import grasp, snip
from leanserve.passes.toolkit.training_options import TrainingOptions
from structural_nets import Residual, image_base, row_base
from tiny_base import TinyBase, context_of, tiny_base
from tiny_encoder import tiny_encoder_base

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK: dict[str, Any] = {"epochs": 2, "batch": 16, "learning_rate": 0.01, "precision": "float32"}


def torch_of(model: Model) -> TorchModel:
    assert isinstance(model, TorchModel)
    return model


def check_sparse(model: TorchModel, sparsity: float) -> None:
    """Masks and zeros are one, and as many as were asked for."""
    total = sum(mask.numel() for mask in model.masks.values())
    assert sum(int((~mask).sum()) for mask in model.masks.values()) == pytest.approx(sparsity * total, abs=8)
    for name, mask in model.masks.items():
        assert not model.module.get_parameter(name)[~mask].any(), name


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_an_untrained_network_is_as_sparse_as_asked_and_stays_so_in_training(method: Any, tmp_path: Path) -> None:
    base = tiny_base()
    pass_ = PruneAtInit(sparsity=0.8, method=method)
    made = torch_of(pass_.apply(base.model(), context_of(base, tmp_path)).model)
    check_sparse(made, 0.8)
    assert not torch.equal(made.module.get_parameter("head.bias"), base.teacher.get_parameter("head.bias"))
    trained = torch_of(Distill.model_validate(QUICK).apply(made, context_of(base, tmp_path / "t")).model)
    check_sparse(trained, 0.8)
    other = torch_of(pass_.apply(base.model(), context_of(base, tmp_path, seed=1)).model)
    assert not torch.equal(other.module.get_parameter("head.weight"), made.module.get_parameter("head.weight"))


class Chain(nn.Module):
    """One path per hidden unit, whose derivatives can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.second(self.first(x))
        return logits


def chain() -> tuple[TorchModel, ArrayData]:
    base = tiny_base()
    torch.manual_seed(0)
    rows = torch.randn(20, 2)
    return TorchModel(Chain(), base.spec), ArrayData((rows.numpy(),), (rows[:, 0] > 0).long().numpy())


def loss_of(model: TorchModel, data: ArrayData) -> Tensor:
    labels = torch.as_tensor(data.labels)
    return nn.functional.cross_entropy(model.module(torch.from_numpy(data.inputs[0])), labels)


def test_snip_tells_what_the_loss_changes_without_a_weight() -> None:
    model, data = chain()
    weight = model.module.get_parameter("first.weight")
    scores = snip(model, ["first.weight"], data)["first.weight"]
    with torch.no_grad():
        before = loss_of(model, data)
        weight[0, 0] *= 1 - 1e-3
        change = abs(float(loss_of(model, data) - before)) / 1e-3
    assert float(scores[0, 0]) == pytest.approx(change, rel=0.02)


def test_grasp_tells_how_the_flow_of_gradients_changes_without_a_weight() -> None:
    model, data = chain()
    names = ["first.weight", "second.weight"]
    weights = [model.module.get_parameter(name) for name in names]

    def flow() -> float:
        return sum(float(item.square().sum()) for item in torch.autograd.grad(loss_of(model, data), weights))

    score = float(grasp(model, names, data)["first.weight"][1, 1])
    before = flow()
    with torch.no_grad():
        weights[0][1, 1] *= 1 - 1e-3
    assert score == pytest.approx((before - flow()) / 2 / 1e-3, rel=0.02)


def test_synflow_keeps_paths_whole(tmp_path: Path) -> None:
    """At once the thin layer would be emptied; a weight that stays is on a path from an input to an output."""
    base = row_base()
    made = torch_of(PruneAtInit(sparsity=0.97, init="given").apply(base.model(), context_of(base, tmp_path)).model)
    first, second, head = (made.masks[f"{name}.weight"] for name in ("first", "second", "head"))
    loose = int((second.any(0) != first.any(1)).sum() + (second.any(1) != head.any(0)).sum())
    assert loose <= 6, "all but what the last round has cut loose is made and read"
    kept = made.module.get_parameter("head.weight")[head]
    assert torch.equal(kept, base.teacher.get_parameter("head.weight")[head])
    tokens = tiny_encoder_base()
    with pytest.raises(PassFailed, match="takes whole numbers; take snip"):
        PruneAtInit(sparsity=0.5).apply(tokens.model(), context_of(tokens, tmp_path))
    unlabelled = replace(base, labels=None)
    with pytest.raises(PassFailed, match="take method: synflow"):
        PruneAtInit(sparsity=0.5, method="snip").apply(base.model(), context_of(unlabelled, tmp_path))


def test_a_ticket_is_rewound_pruned_in_rounds_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[str, int, float, Tensor]] = []
    train = LotteryTicket._train

    def told(self: LotteryTicket, model: TorchModel, epochs: int, context: Any, place: str) -> None:
        weight = model.module.get_parameter("conv.weight").detach().clone()
        total = sum(mask.numel() for mask in model.masks.values()) or 1
        begun.append((place, epochs, sum(int((~mask).sum()) for mask in model.masks.values()) / total, weight))
        train(self, model, epochs, context, place)

    monkeypatch.setattr(LotteryTicket, "_train", told)
    base = tiny_base()
    pass_ = LotteryTicket.model_validate({"sparsity": 0.84, "rounds": 2, "rewind": 1, **QUICK})
    applied = pass_.apply(base.model(), context_of(base, tmp_path))
    check_sparse(torch_of(applied.model), 0.84)
    places, epochs, sparsities, weights = zip(*begun, strict=True)
    assert places == ("rewind", "round-1", "round-2", "ticket", "random")
    assert epochs == (1, 2, 2, 2, 2)
    assert sparsities == pytest.approx((0, 0, 0.6, 0.84, 0.84), abs=0.01)
    kept = weights[3] != 0
    assert torch.equal(weights[2][kept], weights[1][kept]), "back where the first round began"
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[4] != 0, kept)
    assert not torch.equal(weights[4][kept], weights[3][kept])
    assert {"ticket", "random", "sparsity"} == applied.facts.keys()
    assert 0 <= applied.facts["random"] <= 1


def test_a_hunt_for_a_ticket_resumes(tmp_path: Path) -> None:
    def interrupt(done: float, total: float, note: str = "") -> None:
        calls.append(done)
        if len(calls) == 30:
            raise KeyboardInterrupt

    calls: list[float] = []
    base, pass_ = tiny_base(), LotteryTicket.model_validate({"sparsity": 0.8, "rounds": 2, **QUICK})
    with pytest.raises(KeyboardInterrupt):
        pass_.apply(base.model(), context_of(base, tmp_path, interrupt))
    resumed, whole = (
        torch_of(pass_.apply(base.model(), context_of(base, at)).model) for at in (tmp_path, tmp_path / "w")
    )
    for name, value in resumed.module.state_dict().items():
        assert torch.equal(value, whole.module.state_dict()[name]), name


class Weighing(nn.Module):
    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.only = nn.Linear(8, 1, bias=False)
        self.only.weight.data.copy_(torch.tensor([weights]))

    def forward(self, row: Tensor) -> Tensor:
        value: Tensor = self.only(row)
        return value


def test_what_moves_to_zero_goes_however_large_it_is(tmp_path: Path) -> None:
    spec = ModelSpec((TensorSpec("row", "float32", (8,)),), (TensorSpec("value", "float32", (1,)),))
    rows = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    base = TinyBase(Weighing([0.0] * 4 + [2.0] * 4), (rows,), None, spec)
    student = TorchModel(Weighing([3.0] * 4 + [0.3] * 4), spec)
    pass_ = PruneMovement.model_validate({**QUICK, "epochs": 6, "sparsity": 0.5})
    made = torch_of(pass_.apply(student, context_of(base, tmp_path)).model)
    assert made.masks["only.weight"].tolist() == [[False] * 4 + [True] * 4]
    check_sparse(made, 0.5)


def test_movement_may_go_by_blocks_and_resumes(tmp_path: Path) -> None:
    def interrupt(done: float, total: float, note: str = "") -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    base = image_base(Residual(width=8))
    pass_ = PruneMovement.model_validate({**QUICK, "sparsity": 0.5, "block": (4, 3)})
    with pytest.raises(KeyboardInterrupt):
        pass_.apply(base.model(), context_of(base, tmp_path, interrupt))
    resumed, whole = (
        torch_of(pass_.apply(base.model(), context_of(base, at)).model) for at in (tmp_path, tmp_path / "w")
    )
    for name, value in resumed.module.state_dict().items():
        assert torch.equal(value, whole.module.state_dict()[name]), name
    tiles = whole.masks["conv1.weight"].flatten(1).float().reshape(2, 4, 24, 3).mean((1, 3))
    assert set(tiles.flatten().tolist()) == {0.0, 1.0}
    check_sparse(whole, 0.5)


@pytest.mark.parametrize(
    ("pass_", "options", "text"),
    [
        (LotteryTicket, {"sparsity": 0.5, "epochs": 3, "rewind": 3}, "not before the end of the training of 3 epochs"),
        (PruneMovement, {"sparsity": 0.5, "patience": 2}, "end in weights of an earlier sparsity"),
        (PruneMovement, {"sparsity": 0.5, "ema": 0.9}, "drop them"),
        (PruneAtInit, {"sparsity": 0}, "greater than 0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(pass_: Any, options: Any, text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        pass_.model_validate(options)


def test_what_it_needs_follows_its_options() -> None:
    assert PruneAtInit(sparsity=0.5).needs == set()
    assert PruneAtInit(sparsity=0.5, method="grasp").needs == {"train", "labels"}
    assert LotteryTicket(sparsity=0.5, alpha=0.5).needs == TrainingOptions().training_needs | {"labels", "calibration"}
    assert PruneMovement(sparsity=0.5).needs == TrainingOptions().training_needs
