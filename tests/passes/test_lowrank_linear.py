"""Low-rank linear layers: exactness, what data buys, guards, replay."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from leanserve.contracts import ArrayData, ModelSpec, OnnxModel, Split, TensorSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied
from leanserve.passes.families.lowrank.lowrank_linear import LowrankLinear
from leanserve.passes.toolkit.activations import Moments, refit_batch_norm
from leanserve.passes.toolkit.factors import cholesky_scale, input_basis
from leanserve.passes.toolkit.norm_statistics import settle_batch_norm
from leanserve.passes.toolkit.targets import Targets
from structural_nets import answers, row_base
from tiny_base import TinyBase, context_of, lively

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS: tuple[Literal["svd", "asvd", "svd_llm"], ...] = ("svd", "asvd", "svd_llm")


def applied(pass_: LowrankLinear, base: TinyBase, tmp_path: Path) -> tuple[nn.Module, Applied]:
    result = pass_.apply(TorchModel(base.torch_module(), base.spec), context_of(base, tmp_path))
    assert isinstance(result.model, TorchModel)
    return result.model.module, result


def low_rank_base(rank: int) -> TinyBase:
    """Weights of exactly this rank."""
    base = row_base()
    with torch.no_grad():
        for child in base.teacher.modules():
            if isinstance(child, nn.Linear):
                left, values, right = torch.linalg.svd(child.weight, full_matrices=False)
                child.weight.copy_(left[:, :rank] * values[:rank] @ right[:rank])
    return base


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_low_rank_are_kept_exactly(method: Literal["svd", "asvd", "svd_llm"], tmp_path: Path) -> None:
    base = low_rank_base(rank=5)
    pass_ = LowrankLinear(rank=5, method=method, targets=Targets(include=("second", "head")))
    module, _ = applied(pass_, base, tmp_path)
    assert torch.allclose(answers(module, base), answers(base.torch_module(), base), atol=1e-3, rtol=1e-3)


def test_svd_is_the_best_weight_and_svd_llm_the_best_output(tmp_path: Path) -> None:
    base = row_base()
    layer = base.teacher.get_submodule("first")
    rows = torch.tensor(base.inputs[0])
    errors = {}
    for method in METHODS:
        module, _ = applied(LowrankLinear(rank=4, method=method, targets=Targets(include=("first",))), base, tmp_path)
        thin = module.get_submodule("first")
        with torch.no_grad():
            weight = thin(torch.eye(24)) - layer(torch.eye(24))
            errors[method] = (float(weight.norm()), float((thin(rows) - layer(rows)).norm()))
    assert min(errors, key=lambda method: errors[method][0]) == "svd"
    assert min(errors, key=lambda method: errors[method][1]) == "svd_llm"
    assert errors["svd_llm"][1] < 0.7 * errors["svd"][1]
    assert errors["asvd"][1] < errors["svd"][1]


def test_whitened_truncation_loses_exactly_the_dropped_energy() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    matrix = torch.randn(12, 9, generator=generator)
    moments = Moments()
    moments.add(x[:200])
    moments.add(x[200:])
    basis = input_basis(matrix, cholesky_scale(moments.gram))
    split = basis.encode[:, :4] @ basis.decode[:4] @ matrix.double()
    lost = (x.double() @ (split - matrix.double())).square().sum(1).mean()
    assert float(lost) == pytest.approx(float(basis.energies[4:].sum()), rel=1e-3)


def test_fewer_rows_than_dimensions_leave_moments_that_still_factorise() -> None:
    rows = torch.randn(20, 300, generator=torch.Generator().manual_seed(0)) * 1e3
    moments = (rows.T @ rows / 20).float()  # rank 20, and indefinite by rounding
    scale = cholesky_scale(moments)
    error = (scale @ scale.T - moments).norm() / moments.norm()
    assert error < 1e-3


def test_moments_are_those_of_numpy() -> None:
    x = np.random.default_rng(0).standard_normal((50, 5)).astype(np.float32) + 3
    moments = Moments()
    for part in np.split(x, [7, 30]):
        moments.add(torch.tensor(part))
    assert np.allclose(moments.mean, x.mean(0), atol=1e-5)
    assert np.allclose(moments.covariance, np.cov(x.T, bias=True), atol=1e-4)


def test_structure_is_replayed_and_the_input_left_alone(tmp_path: Path) -> None:
    base = row_base()
    pass_ = LowrankLinear(energy=0.8)
    model = TorchModel(base.torch_module(), base.spec)
    before = answers(model.module, base)
    result = pass_.apply(model, context_of(base, tmp_path))
    again = pass_.apply(model, context_of(base, tmp_path))
    assert isinstance(result.model, TorchModel)
    assert isinstance(again.model, TorchModel)
    assert torch.equal(answers(model.module, base), before)
    assert not any(child.training for child in result.model.module.modules())
    fresh = pass_.rebuild_structure(base.torch_module(), result.decisions)
    fresh.load_state_dict(result.model.module.state_dict(), strict=True)
    assert torch.equal(answers(fresh, base), answers(result.model.module, base))
    assert torch.equal(answers(again.model.module, base), answers(result.model.module, base))
    assert result.decisions == again.decisions


def test_macs_target_and_facts(tmp_path: Path) -> None:
    base = row_base()
    _, result = applied(LowrankLinear(macs=0.6, round_to=1), base, tmp_path)
    assert 0.5 < result.facts["macs_ratio"] <= 0.6
    assert result.facts["parameters_ratio"] < 1
    assert result.facts["layers"] == len(result.decisions["ranks"])


def test_batch_norm_is_estimated_anew_where_that_answers_more_like_the_base() -> None:
    base = row_base()
    same = TorchModel(copy.deepcopy(base.teacher), base.spec)
    assert not settle_batch_norm(same, ["first"], base.data("calibration"), base), "it answers as the base already"
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(same.module.buffers(), base.teacher.buffers(), strict=True)
    )
    fitted = TorchModel(copy.deepcopy(base.teacher), base.spec)
    refit_batch_norm(fitted, ["first"], base.data("calibration"))
    trained = replace(base, teacher=fitted.module)  # whose statistics are those of its rows
    moved = TorchModel(copy.deepcopy(trained.teacher), base.spec)
    with torch.no_grad():
        moved.module.get_parameter("first.weight").mul_(3)
    assert settle_batch_norm(moved, ["first"], base.data("calibration"), trained)
    assert not torch.equal(moved.module.get_buffer("norm.running_var"), trained.teacher.get_buffer("norm.running_var"))


def test_batch_norm_follows_the_weights(tmp_path: Path) -> None:
    """Only norms that run after a changed layer are re-estimated."""
    base = row_base()
    after, _ = applied(LowrankLinear(rank=2, targets=Targets(include=("first",))), base, tmp_path)
    assert refit_batch_norm(TorchModel(after, base.spec), ["first"], base.data("train")) == 1
    inputs = after.get_submodule("first")(torch.tensor(base.inputs[0])).detach()
    assert torch.allclose(after.get_buffer("norm.running_mean"), inputs.mean(0), atol=1e-4)
    assert torch.allclose(after.get_buffer("norm.running_var"), inputs.var(0), rtol=0.2)
    before, _ = applied(LowrankLinear(rank=2, targets=Targets(include=("second",))), base, tmp_path)
    assert torch.equal(before.get_buffer("norm.running_mean"), base.torch_module().get_buffer("norm.running_mean"))


class Encoder(nn.Module):
    """Tokens through a stock encoder layer, which reads the weights of its linear layers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
        self.head = nn.Linear(16, 12)
        self.unused = nn.Linear(16, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.head(self.layer(tokens))
        return outputs


def test_layers_that_cannot_be_replaced_are_left_with_the_reason(tmp_path: Path) -> None:
    spec = ModelSpec((TensorSpec("tokens", "float32", (None, 16)),), (TensorSpec("hidden", "float32", (None, 12)),))
    data = np.random.default_rng(0).standard_normal((20, 7, 16)).astype(np.float32)
    base = TinyBase(Encoder().eval(), (data,), None, spec)
    module, result = applied(LowrankLinear(rank=4), base, tmp_path)
    assert result.decisions["ranks"] == {"head": 4}
    assert result.decisions["left"] == {
        "layer.self_attn.out_proj": "MultiheadAttention reads its weight instead of calling it",
        "layer.linear1": "TransformerEncoderLayer reads its weight instead of calling it",
        "layer.linear2": "TransformerEncoderLayer reads its weight instead of calling it",
        "unused": "it is not used",
    }
    assert answers(module, base).shape == (20, 7, 12)


def test_refuses_what_would_not_get_cheaper(tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match=r"energy 1\.0: no layer gets cheaper"):
        applied(LowrankLinear(energy=1.0), row_base(), tmp_path)


def test_refuses_an_onnx_model(tmp_path: Path) -> None:
    base = row_base()
    with pytest.raises(PassFailed, match="lowrank_linear takes torch modules, but the model is ONNX already"):
        LowrankLinear(rank=2).apply(OnnxModel(tmp_path / "model.onnx", base.spec), context_of(base, tmp_path))


class OneRow(TinyBase):
    def data(self, split: Split, n: int | None = None, spec: ModelSpec | None = None) -> ArrayData:
        return super().data(split, 1, spec)


def test_one_row_is_too_few_for_batch_norm(tmp_path: Path) -> None:
    base = row_base()
    with pytest.raises(PassFailed, match="samples: batch norm needs at least 2 calibration rows"):
        applied(LowrankLinear(rank=2), OneRow(base.teacher, base.inputs, base.labels, base.spec), tmp_path)


def test_infinite_activations_are_refused_at_once() -> None:
    with pytest.raises(PassFailed, match="infinities or NaN"):
        cholesky_scale(torch.tensor([[1.0, torch.inf], [torch.inf, 1.0]]))


def test_a_layer_fitted_to_what_it_is_given_now_answers_better(tmp_path: Path) -> None:
    base = row_base()
    later = Targets(include=("second", "head"))  # no batch norm after them is estimated anew
    wanted, errors = answers(base.teacher, base), {}
    for asymmetric in (False, True):
        module, _ = applied(LowrankLinear(rank=5, asymmetric=asymmetric, targets=later), base, tmp_path)
        errors[asymmetric] = float((answers(module, base) - wanted).norm())
    assert errors[True] < 0.98 * errors[False]
    with pytest.raises(ValidationError, match="asymmetric fits layers to outputs, as svd_llm does"):
        LowrankLinear(rank=4, asymmetric=True, method="svd")


class Whisper(nn.Module):
    """A shortcut around a layer, of which a hundredth is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 64)
        self.whispers = nn.Linear(64, 64)
        self.head = nn.Linear(64, 32)

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(row))
        logits: torch.Tensor = self.head(x + 0.01 * self.whispers(x))
        return logits


def test_layers_that_the_answers_hardly_show_pay_for_the_others(tmp_path: Path) -> None:
    outputs = (TensorSpec("logits", "float32", (32,), meaning="logits"),)
    base = row_base()
    base = replace(base, teacher=lively(Whisper(), seed=2), spec=replace(base.spec, outputs=outputs))
    wanted, errors = answers(base.teacher, base), {}
    for sensitivity in ("energy", "answers"):
        options = {"macs": 0.4, "round_to": 1, "sensitivity": sensitivity}
        module, result = applied(LowrankLinear.model_validate(options), base, tmp_path)
        assert result.facts["macs_ratio"] <= 0.4
        errors[sensitivity] = float((answers(module, base) - wanted).norm())
    assert errors["answers"] < 0.9 * errors["energy"]


def test_answers_without_a_distance_tell_nothing(tmp_path: Path) -> None:
    base = row_base()
    base = replace(base, spec=replace(base.spec, outputs=(TensorSpec("class", "int64", ()),)))
    with pytest.raises(PassFailed, match="sensitivity: answers needs outputs with a distance"):
        applied(LowrankLinear(macs=0.5, sensitivity="answers"), base, tmp_path)
