"""Channels in another order: the same function, found again by weights or by answers; and what repair makes good."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from leanserve.contracts import Model, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.families.merge.merge import Merge
from leanserve.passes.families.merge.rebasin import Rebasin
from leanserve.passes.toolkit.barrier import barrier_of
from leanserve.passes.toolkit.permutations import permutation_groups
from leanserve.passes.toolkit.repair import spreads
from structural_nets import Mobile, Perceptron, Residual, answers, image_base, row_base
from tiny_base import TinyBase, TinyNet, context_of, lively, tiny_base

pytestmark = pytest.mark.usefixtures("one_thread")


def torch_of(model: Model) -> TorchModel:
    assert isinstance(model, TorchModel)
    return model


def shuffled(base: TinyBase, noise: float = 0.0) -> TorchModel:
    """The base's model with every free group of channels in a random order, and weights a little off."""
    model = base.model()
    generator = torch.Generator().manual_seed(5)
    for group in permutation_groups(model):
        group.permute(model.module.state_dict(), torch.randperm(group.width, generator=generator))
    for weight in model.module.parameters():
        weight.data += noise * weight.data.std().nan_to_num() * torch.randn(weight.shape, generator=generator)
    return model


@pytest.mark.parametrize("match", ["weight", "activation"])
@pytest.mark.parametrize(
    "base", [image_base(Residual(width=12)), image_base(Mobile()), row_base()], ids=["residual", "mobile", "rows"]
)
def test_a_shuffled_model_is_put_into_its_old_order(base: TinyBase, match: Any, tmp_path: Path) -> None:
    other = shuffled(base, noise=0.01)
    shuffled_answers = answers(other.module, base)
    assert not torch.equal(other.module.state_dict()["head.weight"], base.teacher.state_dict()["head.weight"])
    applied = Rebasin(match=match).join([base.model(), other], context_of(base, tmp_path))
    made = torch_of(applied.model).module
    torch.testing.assert_close(answers(made, base), shuffled_answers, rtol=1e-3, atol=1e-3)
    for name, parameter in base.teacher.named_parameters():
        weight = parameter.detach()
        if weight.ndim > 1:
            torch.testing.assert_close(
                made.get_parameter(name).detach(), weight, rtol=0, atol=0.06 * float(weight.abs().max())
            )
    assert applied.facts["channels_moved"] > 10
    assert applied.facts["barrier_after"] < 0.1 * applied.facts["barrier_before"]
    assert {name: len(losses) for name, losses in applied.decisions["curves"].items()} == {"before": 5, "after": 5}


def test_what_counts_on_the_order_is_no_group() -> None:
    roots = {group.root for group in permutation_groups(image_base(Mobile()).model())}
    assert roots == {"depthwise"}, "the grouped convolution counts on the order of the stem and the projection"
    groups = permutation_groups(image_base(Residual(width=12)).model())
    assert {group.root for group in groups} == {"conv2", "conv1", "down"}
    [tied] = [group for group in groups if group.root == "conv2"]
    assert set(tied.makers) == {"stem.0", "conv2"}


def test_masks_move_with_their_weights(tmp_path: Path) -> None:
    base = row_base()
    other = shuffled(base)
    mask = torch.rand(64, 24, generator=torch.Generator().manual_seed(0)) > 0.5
    other.module.get_parameter("first.weight").data *= mask
    made = torch_of(
        Rebasin().join([base.model(), replace(other, masks={"first.weight": mask})], context_of(base, tmp_path)).model
    )
    assert torch.equal(made.masks["first.weight"], made.module.get_parameter("first.weight") != 0)
    assert not torch.equal(made.masks["first.weight"], mask)


def test_it_takes_two_models_of_one_structure(tmp_path: Path) -> None:
    base = tiny_base()
    context = context_of(base, tmp_path)
    with pytest.raises(PassFailed, match="exactly two parents, and the variant has 3"):
        Rebasin().join([base.model()] * 3, context)
    wide = TorchModel(lively(TinyNet(width=12), seed=1), base.spec)
    with pytest.raises(PassFailed, match=r"they differ in 'conv.bias'; give it such parents"):
        Rebasin().join([base.model(), wide], context)
    flat = replace(base, teacher=nn.Sequential(nn.Flatten(), nn.Linear(64, 2)))
    with pytest.raises(PassFailed, match=r"no hidden channels .* whose order is free; drop the pass"):
        Rebasin().join([flat.model(), flat.model()], context_of(flat, tmp_path))


def test_a_barrier_is_the_rise_above_the_straight_line() -> None:
    assert barrier_of([1.0, 2.0, 3.0, 4.0, 5.0]) == 0
    assert barrier_of([1.0, 2.5, 6.0, 2.5, 3.0]) == 4.0


def test_repair_gives_layers_back_how_much_they_vary(tmp_path: Path) -> None:
    class Plain(Perceptron):
        """Without batch norm there is nothing else to do it."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Identity()  # type: ignore[assignment]

    base = replace(row_base(), teacher=lively(Plain(), seed=1))
    other = TorchModel(lively(copy.deepcopy(base.teacher), seed=9), base.spec)
    parents: list[Model] = [base.model(), other]
    data = base.data("calibration")
    goals = [spreads(torch_of(parent), data)["second"].deviation for parent in parents]
    wanted = torch.stack(goals).mean(0)
    plain, repaired = (
        spreads(torch_of(Merge(repair=repair).join(parents, context_of(base, tmp_path)).model), data)[
            "second"
        ].deviation
        for repair in (False, True)
    )
    torch.testing.assert_close(repaired, wanted, rtol=1e-4, atol=1e-4)
    assert plain.mean() < 0.8 * wanted.mean(), "the mean of strangers is too quiet"
