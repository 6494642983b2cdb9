"""Low-rank convolutions: exact at full rank for every geometry, data beats weights, guards, replay."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from leanserve.contracts import ModelSpec, TensorSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied
from leanserve.passes.families.lowrank.lowrank_conv import LowrankConv
from leanserve.passes.toolkit import conv_splits, layer_times
from leanserve.passes.toolkit.conv_splits import SCHEMES, patches
from leanserve.passes.toolkit.cp_factors import cp_factors, fitted_factors
from leanserve.passes.toolkit.layer_calls import Call
from leanserve.passes.toolkit.targets import Targets
from leanserve.runtime.formats.torch_size import count_macs
from structural_nets import Mobile, Residual, answers, image_base
from tiny_base import TinyBase, context_of

pytestmark = pytest.mark.usefixtures("one_thread")

Scheme = Literal["spatial", "channel", "tucker2"]
SCHEME_NAMES: tuple[Scheme, ...] = ("spatial", "channel", "tucker2")

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2), "bias": False},
    {"kernel_size": (5, 3), "stride": (1, 3), "padding": (0, 2), "dilation": (2, 1)},
    {"kernel_size": 3, "stride": 2, "padding": 3, "dilation": 2},
    {"kernel_size": (2, 3), "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2},
]


def applied(pass_: LowrankConv, base: TinyBase, tmp_path: Path) -> tuple[nn.Module, Applied]:
    result = pass_.apply(TorchModel(base.torch_module(), base.spec), context_of(base, tmp_path))
    assert isinstance(result.model, TorchModel)
    return result.model.module, result


@pytest.mark.parametrize("approximate", ["weight", "output"])
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
# torch says so of an even kernel with padding "same"; the point here is that it stays exact
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_full_rank_is_exact(geometry: dict[str, Any], scheme: Scheme, approximate: Literal["weight", "output"]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, **geometry)
    images = torch.randn(40, 4, 11, 13)
    with torch.no_grad():
        wanted = conv(images)
        split = SCHEMES[scheme](conv, [Call((1, 4, 11, 13), (1, *wanted.shape[1:]))])
        split.look(images, wanted)
        bases = split.bases(approximate)
        ranks = tuple(len(basis.energies) for basis in bases)
        split.fill(bases, ranks, bias=conv.bias is not None or approximate == "output")
        chain = nn.Sequential(*split.convs)
        assert torch.allclose(chain(images), wanted, atol=1e-4)
        if approximate == "output":
            split.compare(images, wanted)
            split.refit()
            assert torch.allclose(chain(images), wanted, atol=1e-3)
        row = TorchModel(chain, ModelSpec((TensorSpec("x", "float32", (4, 11, 13)),), ()))
    assert split.cost(ranks) == count_macs(row)
    assert split.dense == wanted[0].numel() * conv.weight[0].numel()


@pytest.mark.parametrize("geometry", [item for item in GEOMETRIES if item["kernel_size"] != (2, 3)], ids=str)
def test_patches_are_what_the_convolution_multiplies(geometry: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, **{**geometry, "bias": False})
    images = torch.randn(3, 4, 11, 13)
    with torch.no_grad():
        wanted = conv(images).movedim(1, -1).reshape(-1, 6)
        assert torch.allclose(patches(images, conv) @ conv.weight.flatten(1).T, wanted, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_output_approximation_beats_weight_approximation(scheme: Scheme, tmp_path: Path) -> None:
    base = image_base(Residual())
    layer = base.teacher.get_submodule("conv2")
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    answers(base.teacher, base)
    hook.remove()
    errors = {}
    for approximate in ("weight", "output"):
        options = {"scheme": scheme, "approximate": approximate, "rank": 8, "targets": {"include": ["conv2"]}}
        module, _ = applied(LowrankConv.model_validate(options), base, tmp_path)
        with torch.no_grad():
            errors[approximate] = float((module.get_submodule("conv2")(seen[0]) - seen[1]).norm())
    assert errors["output"] < 0.8 * errors["weight"]


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_fitted_outputs_keep_their_mean_and_rank_by_output_energy(scheme: Scheme) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3, padding=1)
    images = torch.randn(60, 6, 9, 9) * torch.arange(1, 7)[:, None, None] + 2
    with torch.no_grad():
        wanted = conv(images)
        split = SCHEMES[scheme](conv)
        split.look(images, wanted)
        bases = split.bases("output")
        split.fill(bases, (2,) * split.ranks, bias=True)
        split.compare(images, wanted)
        split.refit()
        given = nn.Sequential(*split.convs)(images)
    assert torch.allclose(given.mean((0, 2, 3)), wanted.mean((0, 2, 3)), atol=1e-4)
    if split.looks_at_output:
        energies = torch.linalg.eigvalsh(wanted.movedim(1, 0).flatten(1).cov(correction=0).double()).flip(0)
        assert torch.allclose(bases[-1].energies, energies, rtol=1e-3)
    if split.looks_at_input:
        # without data the energy is that of the weight
        assert not torch.allclose(bases[0].energies, split.bases("weight")[0].energies, rtol=0.1)


@pytest.mark.parametrize("approximate", ["weight", "output"])
@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_structure_is_replayed_and_the_input_left_alone(
    scheme: Scheme, approximate: Literal["weight", "output"], tmp_path: Path
) -> None:
    base = image_base(Residual(width=16))
    pass_ = LowrankConv(scheme=scheme, approximate=approximate, energy=0.5, round_to=2)
    model = TorchModel(base.torch_module(), base.spec)
    before = answers(model.module, base)
    result = pass_.apply(model, context_of(base, tmp_path))
    assert isinstance(result.model, TorchModel)
    made = result.model.module
    assert torch.equal(answers(model.module, base), before)
    assert not any(child.training for child in made.modules())
    fresh = pass_.rebuild_structure(base.torch_module(), result.decisions)
    fresh.load_state_dict(made.state_dict(), strict=True)
    assert torch.equal(answers(fresh, base), answers(made, base))
    _, again = applied(pass_, base, tmp_path)
    assert again.decisions == result.decisions
    assert again.facts == result.facts


@pytest.mark.parametrize("scheme", SCHEME_NAMES)
def test_macs_target_is_met(scheme: Scheme, tmp_path: Path) -> None:
    base = image_base(Residual())
    _, result = applied(LowrankConv(scheme=scheme, approximate="weight", macs=0.6, round_to=1), base, tmp_path)
    assert 0.55 < result.facts["macs_ratio"] <= 0.6


def test_what_cannot_be_split_is_left_with_the_reason(tmp_path: Path) -> None:
    _, result = applied(LowrankConv(rank=2, approximate="weight"), image_base(Mobile()), tmp_path)
    assert result.decisions["ranks"] == {"stem": [2]}
    assert result.decisions["left"] == {
        "expand": "its kernel has one row or column",
        "depthwise": "grouped convolution",
        "project": "its kernel has one row or column",
        "grouped": "grouped convolution",
    }


def test_break_even_is_guarded_in_macs(tmp_path: Path) -> None:
    base = image_base(Residual(width=16))
    with pytest.raises(PassFailed, match=r"rank 16x16: .*|rank 16: no layer gets cheaper"):
        applied(LowrankConv(scheme="tucker2", rank=16, targets=Targets(include=("stem",))), base, tmp_path)
    _, result = applied(LowrankConv(scheme="channel", rank=14, approximate="weight"), base, tmp_path)
    assert set(result.decisions["ranks"]) == {"conv1", "conv2", "down"}
    assert "would cost" in result.decisions["left"]["stem.0"]


def test_progress_is_told(tmp_path: Path) -> None:
    base = image_base(Residual(width=16))
    told: list[tuple[float, float]] = []
    context = context_of(base, tmp_path, lambda done, total, note="": told.append((done, total)))
    LowrankConv(rank=2, samples=40).apply(TorchModel(base.torch_module(), base.spec), context)
    assert told[-1] == (40, 40)
    assert len(told) > 2


def test_a_sum_of_three_products_is_found_again() -> None:
    generator = torch.Generator().manual_seed(3)
    sides = [torch.randn(size, 3, generator=generator, dtype=torch.float64) for size in (7, 5, 3, 4)]
    kernel = torch.einsum("nr,cr,hr,wr->nchw", *sides)
    found = torch.einsum("nr,cr,hr,wr->nchw", *cp_factors(kernel, 3))
    assert float((found - kernel).norm() / kernel.norm()) < 0.02
    assert all(torch.equal(a, b) for a, b in zip(cp_factors(kernel, 3), cp_factors(kernel, 3), strict=True))


@pytest.mark.parametrize("scheme", ["cp", "depthwise"])
@pytest.mark.parametrize("geometry", [GEOMETRIES[0], GEOMETRIES[2], GEOMETRIES[6]], ids=str)
def test_products_of_vectors_become_a_chain_of_the_same_shape(geometry: dict[str, Any], scheme: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, **geometry)
    images = torch.randn(10, 4, 11, 13)
    with torch.no_grad():
        wanted = conv(images)
        split = SCHEMES[scheme](conv, [Call((1, 4, 11, 13), (1, *wanted.shape[1:]))])
        errors = []
        for rank in (2, 20):
            split.fill(split.bases("weight"), (rank,), bias=True)
            given = nn.Sequential(*split.convs)(images)
            errors.append(float((given - wanted).norm() / wanted.norm()))
        row = TorchModel(nn.Sequential(*split.convs), ModelSpec((TensorSpec("x", "float32", (4, 11, 13)),), ()))
    assert errors[1] < 0.4 * errors[0]
    assert split.cost((20,)) == count_macs(row)


@pytest.mark.parametrize("scheme", ["cp", "depthwise"])
def test_products_are_fitted_to_the_answers_of_inputs_that_are_seen(scheme: str) -> None:
    """Of correlated channels few directions matter, whatever the weight is in the others."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, 3, padding=1, bias=False)
    images = (torch.randn(8, 2) @ torch.randn(2, 30 * 81)).view(8, 30, 9, 9).transpose(0, 1)
    images += 0.05 * torch.randn_like(images) + 1
    errors = {}
    with torch.no_grad():
        wanted = conv(images)
        for looks in (False, True):
            split = SCHEMES[scheme](conv, [Call((1, 8, 9, 9), (1, 6, 9, 9))])
            if looks:
                split.look(images, wanted)
            split.fill(split.bases("output" if looks else "weight"), (4,), bias=True)
            split.compare(images, wanted)
            split.refit()
            errors[looks] = float((nn.Sequential(*split.convs)(images) - wanted).norm() / wanted.std())
    assert errors[True] < 0.75 * errors[False]


def test_a_fit_to_inputs_of_all_directions_alike_is_the_fit_of_the_weight() -> None:
    generator = torch.Generator().manual_seed(3)
    kernel = torch.randn(5, 4, 9, generator=generator)
    factors = cp_factors(kernel, 6)
    moved = fitted_factors(kernel, factors, torch.eye(36))

    def error(sides: Sequence[torch.Tensor]) -> float:
        return float((torch.einsum("nr,cr,kr->nck", *sides) - kernel).norm())

    assert 0.9 * error(factors) < error(moved) < error(factors) + 1e-6
    lengths = torch.stack([factor.norm(dim=0) for factor in moved])
    torch.testing.assert_close(lengths, lengths[:1].expand_as(lengths))


def test_a_layer_fitted_to_what_it_is_given_now_answers_better(tmp_path: Path) -> None:
    base = image_base(Residual())
    wanted, errors = answers(base.teacher, base), {}
    for asymmetric in (False, True):
        module, _ = applied(LowrankConv(scheme="channel", rank=6, asymmetric=asymmetric), base, tmp_path)
        errors[asymmetric] = float((answers(module, base) - wanted).norm())
    assert errors[True] < 0.98 * errors[False]
    with pytest.raises(ValidationError, match="asymmetric fits layers to outputs"):
        LowrankConv(rank=4, asymmetric=True, approximate="weight")


def test_layers_that_the_answers_hardly_show_pay_for_the_others(tmp_path: Path) -> None:
    base = image_base(Residual())
    with torch.no_grad():
        norm = base.teacher.get_submodule("norm2")
        norm.get_parameter("weight").mul_(0.01)  # of whatever the block does, a hundredth is seen
    wanted, errors = answers(base.teacher, base), {}
    for sensitivity in ("energy", "answers"):
        options = {"scheme": "channel", "macs": 0.6, "round_to": 4, "sensitivity": sensitivity}
        module, result = applied(LowrankConv.model_validate(options), base, tmp_path)
        assert result.facts["macs_ratio"] <= 0.6
        errors[sensitivity] = float((answers(module, base) - wanted).norm())
    assert errors["answers"] < 0.5 * errors["energy"]
    assert result.decisions["left"]["down"] == "the answers lose less by the other layers"
    with pytest.raises(PassFailed, match=r"macs: 0.001 cannot be reached, the lowest ranks still leave 0.351"):
        applied(LowrankConv(macs=0.001, scheme="channel", sensitivity="answers"), base, tmp_path)


def test_ranks_by_time_leave_alone_what_is_measured_to_be_no_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chains of one layer are slow here, whatever their MACs are."""

    def seconds(module: nn.Module, calls: Sequence[Call], channels: int) -> float:
        convs = [child for child in module.modules() if isinstance(child, nn.Conv2d)]
        fixed = 1e9 if calls[0].output[1] == 96 and len(convs) > 1 else 0.0
        return fixed + sum(conv.weight.numel() for conv in convs)

    base = image_base(Residual())
    whole = sum(child.weight.numel() for child in base.teacher.modules() if isinstance(child, nn.Conv2d))
    monkeypatch.setattr(conv_splits, "seconds_of", seconds)
    monkeypatch.setattr(layer_times, "seconds_of_row", lambda _: float(whole))
    pass_ = LowrankConv(latency=0.75, scheme="channel", round_to=4)
    _, result = applied(pass_, base, tmp_path)
    assert "down" in result.decisions["left"]
    assert "times the layer's time" in result.decisions["left"]["down"]
    assert {"conv1", "conv2"} <= set(result.decisions["ranks"])
    assert pass_.times
    assert result.facts["latency_ratio"] > 0
    _, guarded = applied(LowrankConv(rank=8, scheme="channel", break_even="time"), base, tmp_path)
    assert "down" in guarded.decisions["left"]
    with pytest.raises(ValidationError, match="latency chooses by time, and so does its break-even"):
        LowrankConv(latency=0.5, break_even="macs")
