"""Fewer blocks, fewer heads, thinner layers: what goes, that the rest answers as it should, and that it exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from leanserve.contracts import BuildContext, Model, Share, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.families.architecture.student import Student
from leanserve.passes.families.prune.prune_heads import PruneHeads
from leanserve.passes.families.prune.prune_layers import PruneLayers
from leanserve.passes.families.prune.prune_movement import PruneMovement
from leanserve.passes.families.runtime.onnxruntime import OnnxRuntime
from leanserve.passes.toolkit.narrow import units_of
from leanserve.passes.toolkit.stacks import Skip
from leanserve.passes.toolkit.targets import Targets
from leanserve.runtime.formats import open_backend
from leanserve_models.bert import SentenceBert
from leanserve_models.residual import ResidualNet
from stacked_nets import HEADS, WIDTH, Apart, Fused, Stacked, stacked_base
from structural_nets import Residual, answers, image_base, row_base
from tiny_base import TinyBase, context_of, lively
from tiny_encoder import TOKENS, VOCABULARY

pytestmark = pytest.mark.usefixtures("one_thread")


def torch_of(model: Model) -> TorchModel:
    assert isinstance(model, TorchModel)
    return model


def residual_base() -> TinyBase:
    return image_base(ResidualNet(channels=3, classes=10, widths=(16, 32), blocks=3))


def bert_base() -> TinyBase:
    random = np.random.default_rng(0)
    ids = random.integers(1, VOCABULARY, (12, 9))
    mask = np.ones_like(ids)
    mask[::2, 6:] = 0
    module = lively(SentenceBert(VOCABULARY, 16, width=32, heads=4, layers=3), seed=1)
    return TinyBase(module, (ids, mask), None, TOKENS)


def reloaded(pass_: Any, base: TinyBase, folder: Path) -> TorchModel:
    """What the pass makes, and that its decisions make the same structure of a fresh module."""
    applied = pass_.apply(base.model(), context_of(base, folder))
    made = torch_of(applied.model)
    again = pass_.rebuild_structure(base.torch_module(), applied.decisions)
    again.load_state_dict(made.module.state_dict(), strict=True)
    inputs = tuple(map(torch.from_numpy, base.inputs))
    with torch.no_grad():
        assert torch.equal(again(*inputs), made.module(*inputs))
    return made


@pytest.mark.parametrize("score", ["cosine", "kl"])
@pytest.mark.parametrize("kind", ["tensor", "tuple"])
def test_the_block_that_changes_least_goes_and_the_rest_is_as_it_was(score: Any, kind: str, tmp_path: Path) -> None:
    base = stacked_base(Stacked(tuple_=kind == "tuple"))
    made = reloaded(PruneLayers(drop=1, score=score), base, tmp_path)
    assert [type(layer) for layer in made.module.get_submodule("layers").children()].index(Skip) == 1
    x = base.teacher.get_submodule("enter")(torch.from_numpy(base.inputs[0]))
    for place in (0, 2, 3):
        given = base.teacher.get_submodule(f"layers.{place}")(x)
        x = given[0] if kind == "tuple" else given
    torch.testing.assert_close(answers(made.module, base), base.teacher.get_submodule("head")(x.mean(1)).detach())


def test_blocks_that_change_the_shape_are_kept(tmp_path: Path) -> None:
    base = residual_base()
    applied = PruneLayers(drop=4, score="kl").apply(base.model(), context_of(base, tmp_path))
    assert len(applied.decisions["dropped"]) == 4
    assert "stages.3" not in applied.decisions["dropped"]
    assert applied.facts["macs_ratio"] < 0.6
    with pytest.raises(PassFailed, match="drop: 5 of 5 blocks that can go; leave at least one"):
        PruneLayers(drop=5).apply(base.model(), context_of(base, tmp_path))
    only = PruneLayers(drop=1, targets=Targets(include=("stages.4", "stages.5")))
    assert set(only.apply(base.model(), context_of(base, tmp_path)).decisions["dropped"]) < {"stages.4", "stages.5"}
    with pytest.raises(PassFailed, match="no block can be left out"):
        PruneLayers(drop=1).apply(row_base().model(), context_of(row_base(), tmp_path))


@pytest.mark.parametrize(
    ("base", "found"),
    [
        (stacked_base(), {"heads": 4, "feed_forward": 4}),
        (stacked_base(Stacked(Fused)), {"heads": 4, "feed_forward": 4}),
        (bert_base(), {"heads": 3, "feed_forward": 3}),
        (row_base(), {}),
    ],
    ids=["apart", "fused", "own", "none"],
)
def test_heads_and_feed_forward_parts_are_found(base: TinyBase, found: dict[str, int]) -> None:
    units = units_of(base.model())
    assert {what: sum(item.what == what for item in units) for what in {item.what for item in units}} == found
    assert all(item.count == 4 for item in units if item.what == "heads")


@pytest.mark.parametrize("attention", [Apart, Fused])
def test_the_heads_and_neurons_that_add_nothing_go(attention: type[nn.Module], tmp_path: Path) -> None:
    base = stacked_base(Stacked(attention))
    made = reloaded(PruneHeads(heads=0.25, feed_forward=0.5), base, tmp_path)
    first = made.module.get_submodule("layers.0")
    assert first.get_parameter("out.weight").shape == (WIDTH, WIDTH * 3 // 4)
    torch.testing.assert_close(
        first.get_parameter("out.weight"), base.teacher.get_parameter("layers.0.out.weight")[:, WIDTH // HEADS :]
    )
    torch.testing.assert_close(
        first.get_parameter("down.weight"), base.teacher.get_parameter("layers.0.down.weight")[:, 1::2]
    )
    name = "num_heads" if attention is Fused else "num_attention_heads"
    assert vars(first.get_submodule("attention"))[name] == 3
    wanted = answers(base.teacher, base)
    assert float((answers(made.module, base) - wanted).norm() / wanted.norm()) < 0.02


def test_a_head_that_goes_leaves_its_mean(tmp_path: Path) -> None:
    """A neuron that is always the same has nothing to say that a bias cannot."""
    base = stacked_base()
    with torch.no_grad():
        for layer in base.teacher.get_submodule("layers").children():
            layer.get_parameter("up.weight")[1::2] = 0
            layer.get_parameter("down.weight")[:, 1::2] *= 100
            layer.get_parameter("down.weight")[:, ::2] *= 1000
    made = reloaded(PruneHeads(feed_forward=0.5), base, tmp_path)
    torch.testing.assert_close(answers(made.module, base), answers(base.teacher, base), rtol=1e-2, atol=5e-2)


def test_heads_compete_across_layers_and_every_layer_keeps_one(tmp_path: Path) -> None:
    base = bert_base()
    applied = PruneHeads(heads=0.7).apply(base.model(), context_of(base, tmp_path))
    gone = applied.decisions["removed"]
    assert sum(gone.values()) == round(0.7 * 12)
    assert max(gone.values()) == 3
    made = torch_of(applied.model).module
    for place in range(3):
        count = 4 - gone[f"layers.{place}.attention.out"]
        assert vars(made.get_submodule(f"layers.{place}.attention"))["heads"] == count
        assert made.get_parameter(f"layers.{place}.attention.value.weight").shape == (8 * count, 32)


def test_heads_whose_values_training_has_moved_to_zero_are_taken_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, seen = stacked_base(), []
    take_out = PruneMovement._without_idle

    def told(self: PruneMovement, model: TorchModel, context: BuildContext) -> tuple[TorchModel, dict[str, int]]:
        seen.append(answers(model.module, base))
        return take_out(self, model, context)

    monkeypatch.setattr(PruneMovement, "_without_idle", told)
    options = {"sparsity": 0.5, "block": (WIDTH // HEADS, WIDTH), "epochs": 1, "batch": 8, "precision": "float32"}
    pass_ = PruneMovement.model_validate({**options, "targets": {"include": ["layers.*.attention.value"]}})
    made = reloaded(pass_, base, tmp_path)
    applied = pass_.apply(base.model(), context_of(base, tmp_path))
    assert applied.decisions["removed"] == {f"layers.{place}.out": 2 for place in range(4)}
    assert applied.simulated is False
    assert applied.facts["macs_ratio"] < 0.9
    assert made.module.get_parameter("layers.0.attention.query.weight").shape == (WIDTH // 2, WIDTH)
    assert all(mask.shape == made.module.get_parameter(name).shape for name, mask in made.masks.items())
    torch.testing.assert_close(answers(made.module, base), seen[0], rtol=1e-4, atol=1e-4)
    scattered = PruneMovement.model_validate({**options, "block": (1, 1)}).apply(
        base.model(), context_of(base, tmp_path / "scattered")
    )
    assert scattered.simulated, "single weights leave no head idle"


def test_what_is_not_there_or_not_targeted_is_told(tmp_path: Path) -> None:
    base = row_base()
    with pytest.raises(PassFailed, match=r"heads: none are found .* drop the option, or take prune_channels"):
        PruneHeads(heads=0.5).apply(base.model(), context_of(base, tmp_path))
    stacked = stacked_base()
    pass_ = PruneHeads(feed_forward=0.5, targets=Targets(include=("layers.2.*",)))
    made = torch_of(pass_.apply(stacked.model(), context_of(stacked, tmp_path)).model).module
    assert [made.get_parameter(f"layers.{place}.up.weight").shape[0] for place in range(4)] == [64, 64, 32, 64]
    with pytest.raises(ValidationError, match="give heads, feed_forward or both"):
        PruneHeads()


@pytest.mark.parametrize(("share", "kept"), [(0.5, [0, 3]), (0.75, [0, 2, 3]), (0.25, [0])])
def test_a_student_keeps_blocks_at_even_distances_with_their_weights(
    share: float, kept: list[int], tmp_path: Path
) -> None:
    base = stacked_base()
    made = reloaded(Student(blocks=share), base, tmp_path).module
    there = [name for name, layer in made.get_submodule("layers").named_children() if not isinstance(layer, Skip)]
    assert there == [str(place) for place in kept]
    for name, weight in made.named_parameters():
        assert torch.equal(weight, base.teacher.get_parameter(name))


def test_a_student_may_be_thinner_and_may_begin_from_nothing(tmp_path: Path) -> None:
    base = image_base(Residual())
    made = reloaded(Student(width=0.67), base, tmp_path).module
    assert made.get_parameter("conv1.weight").shape[0] == 32
    kept, whole = (set(item.get_parameter("down.weight").detach().flatten().tolist()) for item in (made, base.teacher))
    assert kept < whole
    first, second = (
        torch_of(Student(init="random").apply(base.model(), context_of(base, tmp_path, seed=seed)).model).module
        for seed in (0, 1)
    )
    for name, weight in first.named_parameters():
        if weight.ndim > 1:
            assert not torch.allclose(weight, base.teacher.get_parameter(name))
            assert not torch.allclose(weight, second.get_parameter(name))
    assert torch.equal(first.get_buffer("norm1.running_mean"), torch.zeros(48))
    with pytest.raises(ValidationError, match="a student with all of its teacher is its teacher"):
        Student()
    with pytest.raises(PassFailed, match="all of them; lower it"):
        Student(blocks=0.99).apply(stacked_base().model(), context_of(stacked_base(), tmp_path))


def test_what_is_left_exports_and_answers_the_same(tmp_path: Path) -> None:
    base = stacked_base(Stacked(Fused, tuple_=True))
    model: Model = base.model()
    for pass_ in (Student(blocks=0.75), PruneLayers(drop=1), PruneHeads(heads=0.4, feed_forward=0.5)):
        model = pass_.apply(model, context_of(base, tmp_path / pass_.kind)).model
    wanted = answers(torch_of(model).module, base).numpy()
    (tmp_path / "onnx").mkdir()
    exported = OnnxRuntime().apply(model, context_of(base, tmp_path / "onnx")).model
    given = open_backend(exported, Share(1)).run(base.inputs).outputs[0]
    np.testing.assert_allclose(given, wanted, rtol=1e-3, atol=1e-4)


def test_a_thinner_transformer_keeps_its_heads(tmp_path: Path) -> None:
    made = reloaded(Student(width=0.5), stacked_base(Stacked(Fused)), tmp_path).module
    assert made.get_parameter("layers.0.attention.qkv.weight").shape[0] == 3 * WIDTH
    assert made.get_parameter("layers.0.up.weight").shape[0] == WIDTH
