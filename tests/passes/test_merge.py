"""Model soups: what is averaged, which parents a greedy soup takes in, and what has nothing to average."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from leanserve.contracts import CandidateQuality, Model, TorchModel
from leanserve.errors import PassFailed
from leanserve.hardware import this_hardware
from leanserve.passes.families.merge.merge import Merge
from tiny_base import TinyBase, TinyNet, context_of, lively, tiny_base


@pytest.fixture
def base() -> TinyBase:
    return tiny_base()


def moved(base: TinyBase, *seeds: int, by: float = 0.05) -> list[Model]:
    """The base's model, a step away in some direction each."""
    return [TorchModel(_moved(base.teacher, seed, by), base.spec) for seed in seeds]


def _moved(module: nn.Module, seed: int, by: float) -> nn.Module:
    module, generator = copy.deepcopy(module), torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += by * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def weights(model: Model) -> dict[str, Tensor]:
    assert isinstance(model, TorchModel)
    return dict(model.module.state_dict())


def test_weights_are_averaged_and_batch_norm_is_estimated_anew(base: TinyBase, tmp_path: Path) -> None:
    parents = moved(base, 1, 2, 3)
    before = [{name: tensor.clone() for name, tensor in weights(parent).items()} for parent in parents]
    applied = Merge().join(parents, context_of(base, tmp_path))
    made = weights(applied.model)
    for name in ("stem.weight", "conv.bias", "norm.weight", "head.weight"):
        torch.testing.assert_close(made[name], torch.stack([weights(parent)[name] for parent in parents]).mean(0))
    mean = torch.stack([weights(parent)["norm.running_var"] for parent in parents]).mean(0)
    assert not torch.allclose(made["norm.running_var"], mean, rtol=0.05)
    assert (applied.decisions, applied.facts) == ({"parents": [1, 2, 3]}, {"merged": 3})
    for parent, earlier in zip(parents, before, strict=True):
        assert all(torch.equal(tensor, earlier[name]) for name, tensor in weights(parent).items())


def test_a_weight_stays_zero_where_it_does_in_all_parents(base: TinyBase, tmp_path: Path) -> None:
    def sparse(*rows: int) -> TorchModel:
        model = base.model()
        mask = torch.ones_like(model.module.get_parameter("head.weight"), dtype=torch.bool)
        mask[:, list(rows)] = False
        model.module.get_parameter("head.weight").data *= mask
        return TorchModel(model.module, model.spec, {"head.weight": mask})

    context = context_of(base, tmp_path)
    made = Merge().join([sparse(0, 1), sparse(1, 2)], context).model
    assert isinstance(made, TorchModel)
    assert (~made.masks["head.weight"]).any(0).nonzero().flatten().tolist() == [1]
    half = Merge().join([sparse(0, 1), base.model()], context).model
    assert isinstance(half, TorchModel)
    assert half.masks == {}, "a parent without a mask has weights everywhere"


def test_the_mean_of_equal_parents_is_the_parent(base: TinyBase, tmp_path: Path) -> None:
    made = Merge().join([base.model(), base.model()], context_of(base, tmp_path)).model
    assert torch.equal(weights(made)["head.weight"], weights(base.model())["head.weight"])


def test_a_greedy_soup_leaves_out_what_spoils_it(base: TinyBase, tmp_path: Path) -> None:
    """The base agrees with itself; of its neighbours one is near, and one a stranger."""
    near, opposite = moved(base, 1, by=0.001)[0], copy.deepcopy(base.teacher)
    for parameter in opposite.get_submodule("head").parameters():
        parameter.data *= -5
    stranger = TorchModel(opposite, base.spec)
    unlabelled = TinyBase(base.teacher, base.inputs, None, base.spec)
    applied = Merge(method="greedy").join([stranger, base.model(), near], context_of(unlabelled, tmp_path))
    assert 1 not in applied.decisions["parents"]
    assert applied.decisions["parents"][0] in (2, 3)
    assert applied.facts["soup"] >= applied.facts["best_parent"] > 0.9


def test_a_greedy_soup_takes_the_better_first_and_as_long_as_it_does_not_get_worse(
    base: TinyBase, tmp_path: Path
) -> None:
    asked: list[Model] = []
    answers = [0.5, 0.8, 0.7, 0.8, 0.75]  # of three parents alone; of the best with the next; of these with the last

    def evaluate(model: Model) -> CandidateQuality:
        asked.append(model)
        return CandidateQuality(10, answers[len(asked) - 1], 0.0)

    context = context_of(base, tmp_path)
    context = type(context)(base, 0, this_hardware(1), tmp_path, context.progress, evaluate)
    parents = moved(base, 1, 2, 3)
    applied = Merge(method="greedy").join(parents, context)
    assert applied.decisions == {"parents": [2, 3]}
    assert applied.facts == {"merged": 2, "best_parent": 0.8, "soup": 0.8}
    wanted = torch.stack([weights(parent)["head.weight"] for parent in parents[1:]]).mean(0)
    torch.testing.assert_close(weights(applied.model)["head.weight"], wanted)
    assert len(asked) == 5


def test_a_greedy_soup_of_one_is_that_parent(base: TinyBase, tmp_path: Path) -> None:
    answers = iter([0.9, 0.2, 0.1])
    context = context_of(base, tmp_path)
    context = type(context)(
        base, 0, this_hardware(1), tmp_path, context.progress, lambda _: CandidateQuality(10, next(answers), 0.0)
    )
    parents = moved(base, 1, 2)
    applied = Merge(method="greedy").join(parents, context)
    assert applied.decisions == {"parents": [1]}
    assert all(torch.equal(tensor, weights(parents[0])[name]) for name, tensor in weights(applied.model).items())


@pytest.mark.parametrize("method", ["average", "greedy"])
def test_parents_of_another_structure_are_refused(method: str, base: TinyBase, tmp_path: Path) -> None:
    wide = TorchModel(lively(TinyNet(width=12), seed=1), base.spec)
    with pytest.raises(PassFailed, match=r"'stem.weight' is \[\d+, 1, 3, 3\] in parent \d and .*same passes up to"):
        Merge.model_validate({"method": method}).join([base.model(), wide], context_of(base, tmp_path))

    class More(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    more = TorchModel(lively(More(), seed=1), base.spec)
    with pytest.raises(PassFailed, match="parent 2 has the weight 'scale' and parent 1 has not; merge variants"):
        Merge().join([base.model(), more], context_of(base, tmp_path))
