"""Channel pruning: targets met, rounding, protected outputs, every criterion, replay, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from leanserve.contracts import ArrayData, CandidateQuality, ModelSpec, TensorSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied
from leanserve.passes.families.prune.prune_channels import PruneChannels
from leanserve.passes.toolkit import channel_search, layer_times
from leanserve.passes.toolkit.channels import blocks_of_groups, channel_groups, without
from leanserve.passes.toolkit.importance import BY_LABELS, Criterion, importance_of
from leanserve.passes.toolkit.layer_calls import Call
from leanserve.passes.toolkit.targets import Targets
from leanserve.passes.toolkit.training_options import TrainingOptions
from leanserve.runtime.formats.torch_size import count_macs
from structural_nets import Mobile, Perceptron, Reshaping, Residual, answers, image_base, row_base
from tiny_base import TinyBase, context_of, lively

pytestmark = pytest.mark.usefixtures("one_thread")


def applied(pass_: PruneChannels, base: TinyBase, tmp_path: Path) -> tuple[nn.Module, Applied]:
    result = pass_.apply(TorchModel(base.torch_module(), base.spec), context_of(base, tmp_path))
    assert isinstance(result.model, TorchModel)
    return result.model.module, result


def widths(module: nn.Module) -> dict[str, int]:
    return {
        name: len(child.weight) for name, child in module.named_modules() if isinstance(child, nn.Conv2d | nn.Linear)
    }


@pytest.mark.parametrize("options", [{}, {"ratio": 0.5, "macs": 0.5}, {"ratio": 0.0}, {"macs": 1.0}, {"round": 3}])
def test_exactly_one_target(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PruneChannels.model_validate(options)


@pytest.mark.parametrize("scope", ["global", "uniform"])
@pytest.mark.parametrize("macs", [0.7, 0.4])
def test_macs_target_is_met_and_counts_are_rounded(
    macs: float, scope: Literal["global", "uniform"], tmp_path: Path
) -> None:
    module, result = applied(PruneChannels(macs=macs, scope=scope, round_to=8), image_base(Residual()), tmp_path)
    assert result.facts["macs_ratio"] == pytest.approx(macs, abs=0.06)
    assert result.facts["parameters_ratio"] < 1
    found = widths(module)
    assert found.pop("head") == 10
    assert all(width % 8 == 0 for width in found.values())
    assert found["stem.0"] == found["conv2"]  # tied by the residual sum


def test_a_uniform_ratio_is_taken_from_every_layer(tmp_path: Path) -> None:
    module, _ = applied(PruneChannels(ratio=0.5, round_to=8), image_base(Residual(width=32)), tmp_path)
    assert widths(module) == {"stem.0": 16, "conv1": 16, "conv2": 16, "down": 32, "head": 10}


def test_widths_that_are_no_multiple_are_rounded_down_to_one(tmp_path: Path) -> None:
    module, _ = applied(PruneChannels(ratio=0.25, round_to=16), image_base(Residual(width=20)), tmp_path)
    assert widths(module) == {"stem.0": 16, "conv1": 16, "conv2": 16, "down": 32, "head": 10}


def test_the_weakest_channels_go(tmp_path: Path) -> None:
    base = row_base()
    weak = torch.arange(0, 64, 4)
    with torch.no_grad():
        for name in ("first.weight", "norm.weight"):
            base.teacher.get_parameter(name)[weak] *= 1e-3
        base.teacher.get_parameter("second.weight")[:, weak] *= 1e-3
    pass_ = PruneChannels(ratio=0.25, round_to=16, targets=Targets(include=("first",)))
    module, _ = applied(pass_, base, tmp_path)
    strong = [index for index in range(64) if index % 4]
    assert torch.equal(module.get_parameter("first.weight"), base.teacher.get_parameter("first.weight")[strong])
    assert torch.equal(module.get_parameter("second.weight"), base.teacher.get_parameter("second.weight")[:, strong])


def test_taylor_ranks_by_the_output_that_the_labels_name() -> None:
    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.classes = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.first(x), self.classes(x).softmax(1)

    outputs = (TensorSpec("first", "float32", (3,)), TensorSpec("chances", "float32", (3,), meaning="probabilities"))
    spec = ModelSpec((TensorSpec("x", "float32", (4,)),), outputs, ("a", "b", "c"), labelled=1)
    model = TorchModel(lively(Behind(), seed=1), spec)
    rows, labels = torch.randn(9, 4), torch.arange(9) % 3
    importance_of("taylor", model, ArrayData((rows.numpy(),), labels.numpy()))
    weight = model.module.get_parameter("classes.weight")
    loss = nn.functional.cross_entropy(model.module.get_submodule("classes")(rows), labels, reduction="sum")
    torch.testing.assert_close(weight.grad, torch.autograd.grad(loss, weight)[0])
    assert model.module.get_parameter("first.weight").grad is None


@pytest.mark.parametrize("importance", ["l1", "l2", "taylor", "hessian", "bn_scale", "fpgm", "lamp", "group_lasso"])
@pytest.mark.parametrize("net", [Residual, Mobile])
def test_structure_is_replayed_and_the_input_left_alone(
    net: type[nn.Module], importance: Criterion, tmp_path: Path
) -> None:
    base = image_base(net())
    recovery = None if importance in BY_LABELS else TrainingOptions(epochs=1, batch=16)
    pass_ = PruneChannels(ratio=0.3, importance=importance, round_to=8, steps=2, recovery=recovery)
    model = TorchModel(base.torch_module(), base.spec)
    before = answers(model.module, base)
    result = pass_.apply(model, context_of(base, tmp_path))
    assert isinstance(result.model, TorchModel)
    made = result.model.module
    assert torch.equal(answers(model.module, base), before)
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert not any(child.training for child in made.modules())
    fresh = pass_.rebuild_structure(base.torch_module(), result.decisions)
    fresh.load_state_dict(made.state_dict(), strict=True)
    assert torch.equal(answers(fresh, base), answers(made, base))
    assert "Conv2d" not in str(result.decisions)
    again = pass_.apply(model, context_of(base, tmp_path))
    assert isinstance(again.model, TorchModel)
    assert torch.equal(answers(again.model.module, base), answers(made, base))


def test_depthwise_and_grouped_convolutions_keep_their_kind(tmp_path: Path) -> None:
    module, _ = applied(PruneChannels(ratio=0.5, round_to=8), image_base(Mobile()), tmp_path)
    depthwise, grouped = module.get_submodule("depthwise"), module.get_submodule("grouped")
    assert isinstance(depthwise, nn.Conv2d)
    assert isinstance(grouped, nn.Conv2d)
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels < 64
    assert grouped.groups == 4
    assert grouped.out_channels < 64


def test_linear_layers_and_their_norms_are_pruned(tmp_path: Path) -> None:
    base = row_base()
    module, result = applied(PruneChannels(macs=0.4), base, tmp_path)
    assert isinstance(module, Perceptron)
    assert module.first.out_features == module.norm.num_features == module.second.in_features < 64
    assert module.head.out_features == 10
    assert result.facts["macs_ratio"] == pytest.approx(0.4, abs=0.1)


class Features(nn.Module):
    """Its outputs are the pooled channels of a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3)
        self.inner = nn.Conv2d(32, 32, 3, padding=1)
        self.outer = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        pooled: torch.Tensor = (x + self.outer(torch.relu(self.inner(x)))).mean((2, 3))
        return pooled


def test_no_channel_of_an_output_is_pruned(tmp_path: Path) -> None:
    spec = ModelSpec(image_base(Residual()).spec.inputs, (TensorSpec("embedding", "float32", (32,)),))
    base = replace(image_base(Features()), spec=spec)
    module, _ = applied(PruneChannels(ratio=0.5), base, tmp_path)
    assert widths(module) == {"stem": 32, "inner": 16, "outer": 32}


def test_excluded_layers_keep_their_channels(tmp_path: Path) -> None:
    pass_ = PruneChannels(ratio=0.4, round_to=8, targets=Targets(exclude=("conv2", "down")))
    module, _ = applied(pass_, image_base(Residual(width=32)), tmp_path)
    assert widths(module) == {"stem.0": 32, "conv1": 16, "conv2": 32, "down": 64, "head": 10}  # the sum ties the stem


def test_batch_norm_is_estimated_anew(tmp_path: Path) -> None:
    """Channels that the statistics of the base would mislead: random weights, half of them gone."""
    base = image_base(Residual())
    module, _ = applied(PruneChannels(ratio=0.5), base, tmp_path)
    seen: list[torch.Tensor] = []
    module.get_submodule("norm1").register_forward_hook(lambda _, inputs, output: seen.append(output))
    answers(module, base)
    gain, shift = module.get_parameter("norm1.weight"), module.get_parameter("norm1.bias")
    plain = (seen[0].movedim(1, -1).flatten(0, 2) - shift) / gain
    assert plain.mean(0).abs().max() < 0.05
    assert (plain.std(0) - 1).abs().max() < 0.1


def test_global_scope_takes_from_where_channels_are_weak(tmp_path: Path) -> None:
    """Half of conv1's channels hardly matter; layers compare by the spread of their own channels."""
    base = image_base(Residual(width=32))
    with torch.no_grad():
        for name in ("conv1.weight", "norm1.weight"):
            base.teacher.get_parameter(name)[:16] *= 1e-3
        base.teacher.get_parameter("conv2.weight")[:, :16] *= 1e-3
    module, _ = applied(PruneChannels(ratio=0.1, scope="global"), base, tmp_path)
    assert widths(module) == {"stem.0": 32, "conv1": 16, "conv2": 32, "down": 64, "head": 10}


@pytest.mark.parametrize(
    ("options", "base", "words"),
    [
        ({"macs": 0.05, "round_to": 16}, image_base(Residual(32)), "macs: 0.05 was asked for and 0.2.* round_to"),
        ({"ratio": 0.5, "round_to": 64}, image_base(Residual(32)), "round_to: no prunable layer has more than 64"),
        ({"ratio": 0.01}, image_base(Residual(32)), "ratio: 0.01 was asked for and 0.000 is the nearest"),
        ({"ratio": 0.5, "importance": "bn_scale"}, image_base(Features()), "bn_scale ranks channels by batch norm"),
        ({"ratio": 0.5}, image_base(Reshaping()), "targets: .*conv.* no longer runs.*exclude these layers"),
        ({"ratio": 0.5, "targets": {"exclude": ["hed"]}}, image_base(Residual(32)), "targets.exclude: 'hed'.*head"),
    ],
)
def test_refusals_name_the_option(options: dict[str, Any], base: TinyBase, words: str, tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match=words):
        applied(PruneChannels.model_validate(options), base, tmp_path)


@pytest.mark.parametrize("labels", [None, np.zeros(70, np.float32)], ids=["no labels", "no classes"])
def test_taylor_needs_class_labels(labels: np.ndarray | None, tmp_path: Path) -> None:
    base = replace(image_base(Residual()), labels=labels)
    with pytest.raises(PassFailed, match="importance: taylor needs training data with class labels"):
        applied(PruneChannels(ratio=0.5, importance="taylor"), base, tmp_path)


class Scaled(nn.Module):
    """A parameter of its own along the channels, outside of any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 64)
        self.scale = nn.Parameter(torch.ones(64))
        self.head = nn.Linear(64, 10)

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.first(row) * self.scale)
        return logits


def test_parameters_outside_of_layers_are_pruned_and_replayed(tmp_path: Path) -> None:
    base = replace(row_base(), teacher=lively(Scaled(), seed=3))
    pass_ = PruneChannels(ratio=0.5)
    module, result = applied(pass_, base, tmp_path)
    assert module.get_parameter("scale").shape == (32,)
    fresh = pass_.rebuild_structure(base.torch_module(), result.decisions)
    fresh.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(answers(fresh, base), answers(module, base))


@pytest.mark.parametrize("importance", ["l1", "bn_scale", "fpgm"])
def test_steps_that_would_come_to_one_are_refused(importance: str) -> None:
    options = {"macs": 0.5, "steps": 4, "importance": importance}
    with pytest.raises(
        ValidationError, match=r"steps: 4 would measure .* set recovery, importance: taylor or hessian, or steps: 1"
    ):
        PruneChannels.model_validate(options)
    assert PruneChannels.model_validate({**options, "recovery": {}}).steps == 4
    with pytest.raises(ValidationError, match="recovery trains between steps, and there is one"):
        PruneChannels.model_validate({"macs": 0.5, "recovery": {}})


def test_recovery_between_steps_makes_another_model_that_answers_more_like_the_base(tmp_path: Path) -> None:
    base = image_base(Residual())
    wanted = answers(base.teacher, base)
    recovery = TrainingOptions(epochs=6, batch=16, learning_rate=0.01)
    stepwise = PruneChannels(macs=0.4, round_to=8, steps=4, recovery=recovery)
    once, _ = applied(PruneChannels(macs=0.4, round_to=8), base, tmp_path / "once")
    trained, _ = applied(stepwise, base, tmp_path / "steps")
    assert widths(once) == widths(trained)
    errors = [float((answers(module, base) - wanted).square().mean()) for module in (once, trained)]
    assert errors[1] < 0.8 * errors[0]
    assert sorted(path.name for path in (tmp_path / "steps").iterdir()) == ["step-1", "step-2", "step-3"]
    again, _ = applied(stepwise, base, tmp_path / "steps")
    assert torch.equal(answers(again, base), answers(trained, base)), "an interrupted pass goes on from its checkpoints"


def test_recovery_is_the_same_on_every_cpu_unless_asked() -> None:
    found = [
        PruneChannels(macs=0.5, steps=2, recovery=TrainingOptions.model_validate(options)).recovery
        for options in ({}, {"precision": "bf16"})
    ]
    assert [options.precision for options in found if options is not None] == ["float32", "bf16"]


@pytest.mark.parametrize(
    ("net", "macs", "missed"),
    [(Residual, 0.8, 0.04), (Residual, 0.7, 0.01), (Residual, 0.6, 0.01), (Mobile, 0.65, 0.01), (Mobile, 0.5, 0.05)],
)
def test_a_block_too_large_is_passed_over_for_smaller_ones(
    net: type[nn.Module], macs: float, missed: float, tmp_path: Path
) -> None:
    base, pass_ = image_base(net()), PruneChannels(macs=macs, scope="uniform")
    _, result = applied(pass_, base, tmp_path)
    model = base.model()
    groups = pass_._groups(model, context_of(base, tmp_path))
    blocks = blocks_of_groups(groups, 16, {group.root: len(group.scores) for group in groups}, "uniform")
    in_order = [count_macs(without(model, blocks[:count])) / count_macs(model) for count in range(1, len(blocks) + 1)]
    assert abs(result.facts["macs_ratio"] - macs) < missed
    assert min(abs(share - macs) for share in in_order) > missed, "what blocks in order would come to"


def test_a_target_that_is_missed_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = image_base(Residual(width=32))
    applied(PruneChannels(ratio=0.5), base, tmp_path)
    assert not caplog.messages
    applied(PruneChannels(ratio=0.45), base, tmp_path)
    assert caplog.messages == [
        "prune_channels.ratio: 0.45 was asked for and 0.500 is the nearest that was reached; lower round_to (16), "
        "exclude fewer layers or ask for another value"
    ]


def scores_of(criterion: Criterion, module: nn.Module, data: ArrayData | None = None) -> dict[str, tuple[float, ...]]:
    model = TorchModel(module, image_base(Residual()).spec)
    return {group.root: group.scores for group in channel_groups(model, importance_of(criterion, model, data), [])}


def test_fpgm_ranks_a_filter_that_others_can_stand_for_below_a_small_one_that_they_cannot() -> None:
    module = lively(Residual(), seed=1)
    weight = module.get_parameter("conv1.weight")
    with torch.no_grad():
        weight[:] += 1  # all near each other
        weight[5] = weight[[0, 1, 2, 3]].mean(0)
        weight[7] *= -0.1
    scores = scores_of("fpgm", module)["conv1"]
    assert scores[5] == min(scores)
    assert scores[7] == max(scores)
    assert scores_of("l2", module)["conv1"][7] < scores_of("l2", module)["conv1"][5]


def test_hessian_is_the_mean_square_of_every_rows_gradient() -> None:
    base = image_base(Residual(width=8), rows=3)
    module = base.torch_module()
    assert base.labels is not None
    data = ArrayData(base.inputs, base.labels)
    importance_of("hessian", TorchModel(module, base.spec), data)
    squares = []
    for row in range(3):
        fresh = base.torch_module()
        answers = fresh(torch.from_numpy(base.inputs[0][row : row + 1]))
        torch.autograd.backward(nn.functional.cross_entropy(answers, torch.from_numpy(base.labels[row : row + 1])))
        gradient = fresh.get_parameter("conv1.weight").grad
        assert gradient is not None
        squares.append(gradient.square())
    torch.testing.assert_close(module.get_parameter("conv1.weight").grad, torch.stack(squares).mean(0))


def test_group_lasso_pulls_whole_channels_down(tmp_path: Path) -> None:
    base = image_base(Residual(width=8))
    options = TrainingOptions(epochs=3, batch=16, learning_rate=0.01, precision="float32")
    lengths = {}
    for strength in (1e-9, 1e-1):
        pass_ = PruneChannels(ratio=0.3, round_to=2, importance="group_lasso", recovery=options, strength=strength)
        made = pass_.apply(base.model(), context_of(base, tmp_path / str(strength))).model
        assert isinstance(made, TorchModel)
        lengths[strength] = float(made.module.get_parameter("conv1.weight").detach().flatten(1).norm(dim=1).mean())
    assert lengths[1e-1] < 0.9 * lengths[1e-9]
    with pytest.raises(ValidationError, match="group_lasso ranks channels after training"):
        PruneChannels(ratio=0.3, importance="group_lasso")
    with pytest.raises(ValidationError, match="strength is that of group_lasso"):
        PruneChannels(ratio=0.3, strength=0.1)


def test_of_all_scopes_the_one_that_agrees_most_is_taken(tmp_path: Path) -> None:
    base = image_base(Residual(width=32))
    context = context_of(base, tmp_path)
    agreements = iter((0.5, 0.4, 0.9))
    judged = replace(context, evaluate=lambda _: CandidateQuality(8, None, next(agreements)))
    tried = PruneChannels(macs=0.8, round_to=8).apply(base.model(), judged)
    assert next(agreements, None) is None, "every scope that comes near the target is judged"
    assert tried.decisions["scope"] == "inner"
    assert isinstance(tried.model, TorchModel)
    found = widths(tried.model.module)
    assert found["stem.0"] == found["conv2"] == 32, "what the residual sum ties is left alone"
    assert min(found["conv1"], found["down"] / 2) < 32
    assert tried.decisions["reached"]["macs"] == pytest.approx(0.8, abs=0.03)


def test_channels_that_cost_time_go_before_those_that_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer is slow here, as early convolutions are; by MACs both would go alike."""

    def seconds(module: nn.Module, calls: Sequence[Call], _: int) -> float:
        assert isinstance(module, nn.Linear)
        return module.weight.numel() * (1.0 if calls[0].input == (1, 24) else 0.01)

    def whole(module: nn.Module) -> float:
        return sum(
            seconds(child, [Call((1, 24 if name == "first" else 64), ())], 0)
            for name, child in module.named_modules()
            if isinstance(child, nn.Linear)
        )

    base = row_base()
    monkeypatch.setattr(layer_times, "seconds_of", seconds)
    monkeypatch.setattr(channel_search, "ratio_of", lambda made, of: whole(made.module) / whole(of.module))
    module, result = applied(PruneChannels(latency=0.6, round_to=8), base, tmp_path)
    assert result.facts["latency_ratio"] == pytest.approx(0.6, abs=0.05)
    before, after = widths(base.teacher), widths(module)
    assert after["first"] < before["first"]
    assert after["second"] == before["second"], "what saves no time stays"


def test_a_layer_is_timed_once_at_each_width_and_more_channels_take_longer() -> None:
    model = image_base(Residual(width=64)).model()
    times = layer_times.LayerTimes(model)
    narrow, wide = times.seconds("conv1", 16, 16), times.seconds("conv1", 64, 64)
    assert narrow == times.seconds("conv1", 16, 16)
    assert 0 < narrow < wide  # 16 times the operations


def test_the_time_that_is_asked_for_belongs_to_one_kind_of_cpu() -> None:
    assert PruneChannels(latency=0.5).times
    assert not PruneChannels(macs=0.5).times
    with pytest.raises(ValidationError, match="latency ranks channels by the time that they cost; drop scope: inner"):
        PruneChannels(latency=0.5, scope="inner")
