"""Weights that are set to zero: which ones, how many, that they stay so, and that they are not stored."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from leanserve.contracts import Model, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied
from leanserve.passes.families.distill.distill import Distill
from leanserve.passes.families.prune.prune_magnitude import PruneMagnitude
from leanserve.passes.families.prune.prune_oneshot import PruneOneshot
from leanserve.passes.toolkit.activations import refit_batch_norm
from leanserve.passes.toolkit.reconstruction import Sparsity, sparse_gpt, wanda
from leanserve.passes.toolkit.sparsity import erk_density, masks_by_score
from leanserve.passes.toolkit.targets import Targets
from leanserve.runtime.formats.torch import FORMAT
from structural_nets import Mobile, Perceptron, Residual, answers, image_base, row_base
from tied_nets import tied_base
from tiny_base import TinyBase, context_of, lively, tiny_base

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK: dict[str, Any] = {"epochs": 6, "batch": 16, "learning_rate": 0.01, "precision": "float32"}


def torch_of(model: Model) -> TorchModel:
    assert isinstance(model, TorchModel)
    return model


def zeros(model: Model) -> dict[str, float]:
    weights = torch_of(model).module.named_parameters()
    return {name: float((weight == 0).float().mean()) for name, weight in weights if weight.ndim > 1}


def rows_of_inputs(features: int, rows: int = 400, seed: int = 0) -> Tensor:
    """Inputs that are correlated, and of which some are much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, features // 3, generator=generator) @ torch.randn(
        features // 3, features, generator=generator
    )
    return (mixed + 0.3 * torch.randn(rows, features, generator=generator)) * torch.linspace(0.1, 3, features)


@pytest.mark.parametrize("scope", ["local", "global", "erk"])
def test_the_share_that_is_asked_for_becomes_zero(scope: Any, tmp_path: Path) -> None:
    base = image_base(Residual(width=8))
    applied = PruneMagnitude(sparsity=0.6, scope=scope).apply(base.model(), context_of(base, tmp_path))
    weights = dict(torch_of(applied.model).module.named_parameters())
    counted = [
        (weights[name] == 0).float().sum() / mask.numel() for name, mask in torch_of(applied.model).masks.items()
    ]
    total = sum(weights[name].numel() for name in torch_of(applied.model).masks)
    assert sum(int((weights[name] == 0).sum()) for name in torch_of(applied.model).masks) == pytest.approx(
        0.6 * total, abs=len(counted)
    )
    assert applied.facts["sparsity"] == pytest.approx(0.6, abs=0.002)
    spread = max(counted) - min(counted)
    assert (spread < 0.01) == (scope == "local")


def test_a_scope_decides_who_competes() -> None:
    scores = {"large": torch.arange(1.0, 9).reshape(2, 4) * 100, "small": torch.arange(1.0, 9).reshape(2, 4)}
    local = masks_by_score(scores, 0.25, "local")
    assert [int(mask.sum()) for mask in local.values()] == [6, 6]
    assert not local["large"][0, :2].any()
    everywhere = masks_by_score(scores, 0.25, "global")
    assert [int(mask.sum()) for mask in everywhere.values()] == [8, 4]
    with pytest.raises(PassFailed, match=r"leaves nothing of 'small'; .*take scope: erk"):
        masks_by_score(scores, 0.5, "global")


def test_erk_keeps_more_of_small_layers_and_hits_the_whole() -> None:
    shaped = {"thin": torch.zeros(4, 4), "wide": torch.zeros(64, 64), "kernel": torch.zeros(32, 16, 3, 3)}
    density = erk_density(shaped, 0.1)
    assert density["thin"] == 1.0
    ratio = (128 / 4096) / ((32 + 16 + 6) / (32 * 16 * 9))
    assert density["wide"] / density["kernel"] == pytest.approx(ratio)
    kept = sum(density[name] * item.numel() for name, item in shaped.items())
    assert kept == pytest.approx(0.1 * sum(item.numel() for item in shaped.values()))


def test_the_largest_weights_stay_as_they_are(tmp_path: Path) -> None:
    base = row_base()
    made = torch_of(PruneMagnitude(sparsity=0.5, scope="local").apply(base.model(), context_of(base, tmp_path)).model)
    before, after = base.teacher.get_parameter("second.weight"), made.module.get_parameter("second.weight")
    kept = after != 0
    assert torch.equal(after[kept], before[kept])
    assert before[kept].abs().min() >= before[~kept].abs().max()


def test_sparsity_grows_along_the_cubic_while_it_trains_and_ends_where_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    choose = PruneMagnitude._choose

    def told(self: PruneMagnitude, model: TorchModel, share: float = 1.0) -> dict[str, Tensor]:
        shares.append(share)
        return choose(self, model, share)

    monkeypatch.setattr(PruneMagnitude, "_choose", told)
    base = tiny_base()
    refit_batch_norm(TorchModel(base.teacher, base.spec), ["stem"], base.data("train"))  # made up, they fit no rows
    pass_ = PruneMagnitude.model_validate({"sparsity": 0.7, "recovery": QUICK, "ramp": 0.5})
    made = torch_of(pass_.apply(base.model(), context_of(base, tmp_path)).model)
    assert shares == pytest.approx([1 - (1 - step / 12) ** 3 for step in range(1, 13)])
    total = sum(mask.numel() for mask in made.masks.values())
    assert sum(int((~mask).sum()) for mask in made.masks.values()) == round(0.7 * total)
    assert all(not made.module.get_parameter(name)[~mask].any() for name, mask in made.masks.items())
    at_once = torch_of(PruneMagnitude(sparsity=0.7).apply(base.model(), context_of(base, tmp_path / "b")).model)
    errors = [float((answers(item.module, base) - answers(base.teacher, base)).norm()) for item in (made, at_once)]
    assert errors[0] < errors[1]


def test_an_interrupted_growth_resumes_to_the_same_weights(tmp_path: Path) -> None:
    def interrupt(done: float, total: float, note: str = "") -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    base = tiny_base()
    pass_ = PruneMagnitude.model_validate({"sparsity": 0.7, "recovery": QUICK, "ramp": 0.9})
    with pytest.raises(KeyboardInterrupt):
        pass_.apply(base.model(), context_of(base, tmp_path, interrupt))
    resumed, whole = (pass_.apply(base.model(), context_of(base, place)).model for place in (tmp_path, tmp_path / "w"))
    for name, value in torch_of(resumed).module.state_dict().items():
        assert torch.equal(value, torch_of(whole).module.state_dict()[name]), name


@pytest.mark.parametrize(
    "pass_", [PruneMagnitude(sparsity=0.8), PruneOneshot(pattern="1:4")], ids=lambda item: item.kind
)
def test_zeros_survive_later_training_and_later_pruning_adds_to_them(pass_: Any, tmp_path: Path) -> None:
    base = image_base(Residual(width=8))
    made = torch_of(pass_.apply(base.model(), context_of(base, tmp_path)).model)
    trained = torch_of(Distill(epochs=1, precision="float32").apply(made, context_of(base, tmp_path / "t")).model)
    assert not torch.equal(trained.module.get_parameter("conv1.weight"), made.module.get_parameter("conv1.weight"))
    assert zeros(trained) == zeros(made)
    for again in (PruneMagnitude(sparsity=0.9), PruneOneshot(sparsity=0.9)):
        more = torch_of(again.apply(trained, context_of(base, tmp_path / again.kind)).model)
        for name, mask in made.masks.items():
            assert not more.masks[name][~mask].any()
            assert not more.module.get_parameter(name)[~mask].any()


def test_only_what_stays_is_stored_and_it_comes_back(tmp_path: Path) -> None:
    base = image_base(Residual())
    made = torch_of(PruneMagnitude(sparsity=0.9).apply(base.model(), context_of(base, tmp_path)).model)
    size = {}
    for name, model in (("sparse", made), ("dense", replace(made, masks={}))):
        (tmp_path / name).mkdir()
        FORMAT.save(model, tmp_path / name)
        size[name] = (tmp_path / name / "model.safetensors").stat().st_size
    assert size["sparse"] < 0.16 * size["dense"], "a tenth of the numbers, and a bit for each of all"
    found = FORMAT.load(tmp_path / "sparse", base.spec, lambda: lively(Residual(), seed=9))
    for name, value in made.module.state_dict().items():
        assert torch.equal(value, found.module.state_dict()[name]), name
    assert all(torch.equal(mask, found.masks[name]) for name, mask in made.masks.items())


def test_a_mask_that_its_weight_does_not_follow_costs_no_weight(tmp_path: Path) -> None:
    base = row_base()
    model = replace(base.model(), masks={"first.weight": torch.zeros(64, 24, dtype=torch.bool)})
    FORMAT.save(model, tmp_path)
    found = FORMAT.load(tmp_path, base.spec, lambda: lively(Perceptron(), seed=9))
    assert torch.equal(found.module.get_parameter("first.weight"), base.teacher.get_parameter("first.weight"))


def test_embedding_tables_stay_whole_and_layers_that_share_one_too(tmp_path: Path) -> None:
    base = tied_base()
    for pass_ in (PruneMagnitude(sparsity=0.5), PruneOneshot(sparsity=0.5)):
        made = torch_of(pass_.apply(base.model(), context_of(base, tmp_path / pass_.kind)).model)
        assert set(made.masks) == {"mix.weight", "last.weight"}
        assert torch.equal(made.module.get_parameter("tokens.weight"), base.teacher.get_parameter("tokens.weight"))


def test_wanda_looks_at_inputs_and_compares_within_an_output() -> None:
    weight = torch.tensor([[3.0, 1.0, 2.0, 4.0], [30.0, 10.0, 20.0, 40.0]])
    gram = torch.diag(torch.tensor([0.01, 100.0, 1.0, 1.0]))
    mask = wanda(weight, gram, Sparsity(0.5))
    assert mask.tolist() == [[False, True, False, True]] * 2


@pytest.mark.parametrize(("method", "pattern"), [("wanda", "2:4"), ("sparsegpt", "1:4"), ("sparsegpt", "4:8")])
def test_a_pattern_leaves_so_many_of_every_neighbours(method: Any, pattern: str, tmp_path: Path) -> None:
    base = image_base(Residual(width=8))
    made = torch_of(PruneOneshot(method=method, pattern=pattern).apply(base.model(), context_of(base, tmp_path)).model)
    keep, group = map(int, pattern.split(":"))
    for name in ("conv1.weight", "down.weight", "head.weight"):
        mask = made.masks[name].flatten(1)
        assert set(mask.reshape(-1, group).sum(1).tolist()) == {keep}, name
        assert not made.module.get_parameter(name).flatten(1)[~mask].any()


def test_sparsegpt_beats_wanda_beats_magnitude_on_what_the_layer_answers() -> None:
    x = rows_of_inputs(48)
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(3))
    gram = (x.T @ x).double() / len(x)

    def error(made: Tensor) -> float:
        return float((x @ (weight - made).T.float()).norm() / (x @ weight.T).norm())

    corrected, mask = sparse_gpt(weight, gram, Sparsity(0.6), torch.ones_like(weight, dtype=torch.bool))
    by_size = masks_by_score({"w": weight.abs()}, 0.6, "local")["w"]
    found = [error(corrected), error(weight * wanda(weight, gram, Sparsity(0.6))), error(weight * by_size)]
    assert int((corrected != 0).sum()) == int(mask.sum()) == round(0.4 * weight.numel())
    assert found[0] < 0.8 * found[1]
    assert found[1] < 0.9 * found[2]


def test_sparsegpt_corrects_like_least_squares() -> None:
    """Of one row, the columns before a removed one are fixed; those behind it make up for it exactly."""
    x = rows_of_inputs(6)
    weight = torch.randn(1, 6, generator=torch.Generator().manual_seed(1))
    gram = (x.T @ x).double() / len(x)
    allowed = torch.tensor([[False, True, True, True, True, True]])
    made, _ = sparse_gpt(weight, gram, Sparsity(0.0), allowed)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    best = weight.double()[:, 1:] + weight.double()[:, :1] @ damped[:1, 1:] @ torch.linalg.inv(damped[1:, 1:])
    torch.testing.assert_close(made[:, 1:], best, rtol=1e-5, atol=1e-5)
    assert made[0, 0] == 0


def test_an_input_that_is_always_zero_costs_nothing() -> None:
    x = rows_of_inputs(8)
    x[:, 2] = 0
    weight = torch.ones(4, 8)
    made, mask = sparse_gpt(weight, (x.T @ x).double(), Sparsity(0.125), torch.ones_like(weight, dtype=torch.bool))
    assert made.isfinite().all()
    assert not mask[:, 2].any()


def test_grouped_convolutions_are_left_and_the_reason_is_told(tmp_path: Path) -> None:
    base = image_base(Mobile())
    applied = PruneOneshot(sparsity=0.5).apply(base.model(), context_of(base, tmp_path))
    assert applied.decisions["left"] == {"depthwise": "grouped convolution", "grouped": "grouped convolution"}
    assert "expand.weight" in torch_of(applied.model).masks
    only = PruneOneshot(sparsity=0.5, targets=Targets(include=("grouped",)))
    with pytest.raises(PassFailed, match=r"no layer can be pruned \(grouped: grouped convolution"):
        only.apply(base.model(), context_of(base, tmp_path))


@pytest.mark.parametrize(
    ("pass_", "options", "text"),
    [
        (PruneMagnitude, {"sparsity": 0.5, "ramp": 0.5}, "set recovery, or drop ramp"),
        (PruneMagnitude, {"sparsity": 0.5, "recovery": {"patience": 1}}, "patience could end the training"),
        (PruneMagnitude, {"sparsity": 1.0}, "less than 1"),
        (PruneOneshot, {"sparsity": 0.5, "pattern": "2:4"}, "give one of sparsity and pattern"),
        (PruneOneshot, {"pattern": "4:4"}, "would keep everything"),
        (PruneOneshot, {"pattern": "2 of 4"}, "pattern"),
    ],
)
def test_options_that_contradict_each_other_are_refused(pass_: Any, options: Any, text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        pass_.model_validate(options)


def test_what_it_needs_follows_its_options() -> None:
    assert PruneMagnitude(sparsity=0.5).needs == {"calibration"}
    assert PruneMagnitude.model_validate({"sparsity": 0.5, "recovery": {}}).needs == {"train", "batches"}
    assert PruneOneshot(sparsity=0.5).needs == {"calibration"}


def applied_to(base: TinyBase, pass_: Any, folder: Path) -> Applied:
    before = copy.deepcopy(base.teacher.state_dict())
    model = base.model()
    applied: Applied = pass_.apply(model, context_of(base, folder))
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    return applied


def test_only_what_is_targeted_becomes_sparse_and_the_given_model_stays(tmp_path: Path) -> None:
    base = row_base()
    targets = Targets(include=("type:Linear",), exclude=("head",))
    for pass_ in (PruneMagnitude(sparsity=0.5, targets=targets), PruneOneshot(sparsity=0.5, targets=targets)):
        applied = applied_to(base, pass_, tmp_path / pass_.kind)
        assert {name for name, share in zeros(applied.model).items() if share} == {"first.weight", "second.weight"}
    nothing = PruneMagnitude(sparsity=0.5, targets=Targets(include=("type:BatchNorm1d",)))
    with pytest.raises(PassFailed, match="have no matrices or kernels"):
        nothing.apply(base.model(), context_of(base, tmp_path))


def test_attention_that_reads_its_weights_can_be_sparse(tmp_path: Path) -> None:
    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
            self.head = nn.Linear(24, 10)

        def forward(self, row: Tensor) -> Tensor:
            x, _ = self.attention(row[:, None], row[:, None], row[:, None])
            logits: Tensor = self.head(x[:, 0])
            return logits

    base = replace(row_base(), teacher=lively(Attentive(), seed=1))
    made = PruneMagnitude(sparsity=0.5).apply(base.model(), context_of(base, tmp_path)).model
    assert zeros(made)["attention.in_proj_weight"] > 0.2
    applied = PruneOneshot(sparsity=0.5).apply(base.model(), context_of(base, tmp_path))
    assert list(applied.decisions["left"]) == ["attention.out_proj"]
