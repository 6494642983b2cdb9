"""Model soups: what is averaged, which parents a greedy soup takes in, and what has nothing to average."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from leanserve.contracts import CandidateQuality, Model, TorchModel
from leanserve.errors import PassFailed
from leanserve.hardware import this_hardware
from leanserve.passes.families.merge.merge import Merge
from leanserve.passes.toolkit.mixing import slerp, task_sum
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
    assert applied.decisions["parents"] == [1]
    assert len(applied.decisions["curves"]["between the parents"]) == 5
    assert applied.facts["barrier"] >= 0
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


def flat(model: Model) -> Tensor:
    assert isinstance(model, TorchModel)
    return torch.cat([weight.detach().flatten() for weight in model.module.parameters()]).double()


def joined(options: dict[str, Any], models: list[Model], base: TinyBase, folder: Path) -> Model:
    return Merge.model_validate(options).join(models, context_of(base, folder)).model


def test_weights_of_an_average_are_shares(base: TinyBase, tmp_path: Path) -> None:
    parents = moved(base, 1, 2)
    made = joined({"weights": [1, 3]}, parents, base, tmp_path)
    torch.testing.assert_close(flat(made), flat(parents[0]) / 4 + 3 * flat(parents[1]) / 4, rtol=0, atol=1e-6)


def test_slerp_keeps_the_length_that_a_mean_shortens(base: TinyBase, tmp_path: Path) -> None:
    parents = moved(base, 1, 2, by=0.5)
    lengths = [float(weights(parent)["head.weight"].norm()) for parent in parents]
    made, mean = (joined({"method": method}, parents, base, tmp_path) for method in ("slerp", "average"))
    assert float(weights(mean)["head.weight"].norm()) < 0.95 * min(lengths)
    assert min(lengths) * 0.97 < float(weights(made)["head.weight"].norm()) < max(lengths) * 1.03
    first = joined({"method": "slerp", "weights": [1, 0]}, parents, base, tmp_path)
    torch.testing.assert_close(flat(first), flat(parents[0]), rtol=0, atol=1e-6)


def test_slerp_is_half_way_along_a_quarter_circle_and_a_line_where_there_is_no_arc() -> None:
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    torch.testing.assert_close(slerp(a, b, 0.5), torch.full((2,), 2 / 2**0.5, dtype=torch.float64))
    torch.testing.assert_close(slerp(a, 2 * a, 0.5), 1.5 * a.double())
    torch.testing.assert_close(slerp(torch.zeros(2), b, 0.5), b.double() / 2)


def test_task_arithmetic_adds_and_takes_away_what_was_learned(base: TinyBase, tmp_path: Path) -> None:
    ancestor, one, other = base.model(), *moved(base, 1, 2)
    made = joined({"method": "task_arithmetic"}, [ancestor, one, other], base, tmp_path)
    torch.testing.assert_close(flat(made), flat(one) + flat(other) - flat(ancestor), rtol=0, atol=1e-6)
    away = joined({"method": "task_arithmetic", "weights": [1, -1]}, [ancestor, one, one], base, tmp_path)
    torch.testing.assert_close(flat(away), flat(ancestor), rtol=0, atol=1e-6)


def test_ties_trims_elects_a_sign_and_averages_those_that_agree() -> None:
    one, other, third = (
        torch.tensor(numbers, dtype=torch.float64)
        for numbers in ([5.0, -4.0, 0.1, 3.0, 0.0], [3.0, 6.0, 0.2, 0.0, 0.0], [0.1, 1.0, 0.0, -5.0, 4.0])
    )
    made = task_sum("ties", [one, other, third], [1, 1, 1], density=0.6)
    # Trimmed to three of five: [5, -4, 0, 3, 0], [3, 6, 0.2, 0, 0], [0, 1, 0, -5, 4].
    assert made.tolist() == pytest.approx([4.0, 3.5, 0.2, -5.0, 4.0])


def test_dare_drops_at_random_scales_up_and_goes_by_the_seed(base: TinyBase, tmp_path: Path) -> None:
    ancestor, one = base.model(), moved(base, 1)[0]
    options = {"method": "dare", "density": 0.25}
    change = flat(joined(options, [ancestor, one], base, tmp_path)) - flat(ancestor)
    kept = change.abs() > 1e-6
    assert 0.2 < float(kept.double().mean()) < 0.3
    torch.testing.assert_close(change[kept], 4 * (flat(one) - flat(ancestor))[kept], rtol=1e-3, atol=1e-5)
    again = flat(joined(options, [ancestor, one], base, tmp_path)) - flat(ancestor)
    assert torch.equal(change, again)
    other = Merge.model_validate(options).join([ancestor, one], context_of(base, tmp_path, seed=1)).model
    assert not torch.equal(flat(other) - flat(ancestor), change)


@pytest.mark.parametrize(
    ("options", "parents", "text"),
    [
        ({"method": "slerp"}, 3, "slerp takes exactly two parents, and the variant has 3"),
        ({"method": "ties"}, 1, "ties takes at least two parents"),
        ({"weights": [1, 1]}, 3, "2 numbers for 3 parents; give one of each"),
        ({"method": "dare", "weights": [1, 1]}, 2, "2 numbers for 1 parents after the first, which is their ancestor"),
    ],
)
def test_parents_that_do_not_fit_the_method_are_refused(
    options: dict[str, Any], parents: int, text: str, base: TinyBase, tmp_path: Path
) -> None:
    with pytest.raises(PassFailed, match=text):
        joined(options, [base.model()] * parents, base, tmp_path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"density": 0.5}, "drop it with average"),
        ({"method": "greedy", "weights": [1, 1]}, "greedy finds out which parents count"),
        ({"weights": [1, -1]}, "none below 0"),
        ({"method": "ties", "repair": True}, "which ties does not make"),
    ],
)
def test_options_of_another_method_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        Merge.model_validate(options)
