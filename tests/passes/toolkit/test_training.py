from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from leanserve.contracts import RowsTogether
from leanserve.errors import PassFailed
from leanserve.passes.toolkit.augmentation import AUGMENTATIONS
from leanserve.passes.toolkit.training import FAST_BF16, TrainingOptions, train
from tiny_base import TinyBase, TinyNet, context_of, lively, tiny_base

if TYPE_CHECKING:
    from leanserve.passes.toolkit.training import Loss

FAST = TrainingOptions(epochs=4, batch=16, precision="float32")


def cross_entropy(module: nn.Module) -> Loss:
    def loss(inputs: tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None
        return nn.functional.cross_entropy(module(*inputs), labels)

    return loss


def trained(scratch: Path, options: TrainingOptions = FAST, seed: int = 0) -> nn.Module:
    module = lively(TinyNet(), seed=7)
    train(module, cross_entropy(module), options, context_of(tiny_base(), scratch, seed=seed))
    return module


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_training_lowers_the_loss_and_ends_in_eval_mode(tmp_path: Path, optimiser: str) -> None:
    module = lively(TinyNet(), seed=7)
    options = TrainingOptions.model_validate({"epochs": 5, "batch": 16, "optimiser": optimiser, "learning_rate": 0.01})
    outcome = train(module, cross_entropy(module), options, context_of(tiny_base(), tmp_path))
    assert outcome.last_loss < 0.7 * outcome.first_loss
    assert outcome.resumed_from == 0
    assert not module.training


@pytest.mark.parametrize("rows", ["one", "one_length"])
def test_what_must_not_share_a_batch_is_not_trained_in_batches(tmp_path: Path, rows: RowsTogether) -> None:
    base = tiny_base()
    apart = replace(base, spec=replace(base.spec, rows=rows))
    module = lively(TinyNet(), seed=7)
    with pytest.raises(PassFailed, match=rf"training runs batches of any rows, and base\.rows: {rows} says"):
        train(module, cross_entropy(module), FAST, context_of(apart, tmp_path))


def test_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    options = TrainingOptions(epochs=2, batch=16, augment="affine", precision="float32")
    first, again, other = (trained(tmp_path / name, options, seed) for name, seed in [("a", 3), ("b", 3), ("c", 4)])
    assert equal(first, again)
    assert not equal(first, other)


@pytest.mark.parametrize("step", [1, 9, 14])
def test_an_interrupted_run_ends_in_the_weights_of_an_undisturbed_one(tmp_path: Path, step: int) -> None:
    options = TrainingOptions(epochs=4, batch=16, augment="shift", precision="float32")
    whole = trained(tmp_path / "whole", options)

    def interrupt(done: float, total: float, note: str = "") -> None:
        if done == step:
            raise KeyboardInterrupt

    module = lively(TinyNet(), seed=7)
    with pytest.raises(KeyboardInterrupt):
        train(module, cross_entropy(module), options, context_of(tiny_base(), tmp_path, interrupt))
    module = lively(TinyNet(), seed=7)
    seen: list[float] = []
    watch = context_of(tiny_base(), tmp_path, lambda done, total, note="": seen.append(done))
    outcome = train(module, cross_entropy(module), options, watch)
    assert equal(module, whole)
    assert outcome.resumed_from == (step - 1) // 4
    assert seen == list(range(4 * outcome.resumed_from + 1, 17)), "67 rows are 4 whole batches of 16"


def test_a_checkpoint_of_other_options_is_not_used(tmp_path: Path) -> None:
    trained(tmp_path)
    module = lively(TinyNet(), seed=7)
    other = FAST.model_copy(update={"epochs": 5})
    assert train(module, cross_entropy(module), other, context_of(tiny_base(), tmp_path)).resumed_from == 0


def test_a_checkpoint_cut_short_by_a_kill_is_never_read(tmp_path: Path) -> None:
    (tmp_path / "training.partial").write_bytes(b"half")
    assert equal(trained(tmp_path), trained(tmp_path / "clean"))


@pytest.mark.parametrize("content", [b"", b"half", bytes(64)])
def test_an_unreadable_checkpoint_is_trained_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "training.safetensors").write_bytes(content)
    assert equal(trained(tmp_path), trained(tmp_path / "clean"))


def test_zeros_of_a_sparse_weight_stay_and_an_all_zero_weight_learns(tmp_path: Path) -> None:
    module = lively(TinyNet(), seed=7)
    assert isinstance(module, TinyNet)
    with torch.no_grad():
        module.conv.weight[:, ::2] = 0
        module.head.weight.zero_()
        module.norm.bias[:] = 0
    train(module, cross_entropy(module), FAST, context_of(tiny_base(), tmp_path))
    assert module.conv.weight[:, ::2].count_nonzero() == 0
    assert module.conv.weight[:, 1::2].count_nonzero() == module.conv.weight[:, 1::2].numel()
    assert module.head.weight.count_nonzero() == module.head.weight.numel()
    assert module.norm.bias.count_nonzero() == 8


def test_weight_decay_leaves_biases_and_norms_alone(tmp_path: Path) -> None:
    module = lively(TinyNet(), seed=7)
    before = copy.deepcopy(module)
    options = TrainingOptions(epochs=1, batch=16, weight_decay=10.0, precision="float32")

    def flat(inputs: tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> torch.Tensor:
        return torch.stack([weight.sum() * 0 for weight in module.parameters()]).sum()

    train(module, flat, options, context_of(tiny_base(), tmp_path))
    for (name, now), then in zip(module.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then) == (now.ndim == 1), name


def test_learning_rate_rises_then_falls_to_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW) -> None:
        rates.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    trained(tmp_path, TrainingOptions(epochs=5, batch=16, warmup=0.2, learning_rate=0.01, precision="float32"))
    peak = rates.index(max(rates))
    assert len(rates) == 20
    assert peak == 4
    assert rates == [*sorted(rates[:peak]), *sorted(rates[peak:], reverse=True)]
    assert max(rates) == pytest.approx(0.01)
    assert rates[-1] < 0.0002


def test_a_loss_that_is_not_finite_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    module = lively(TinyNet(), seed=7)
    with pytest.raises(PassFailed, match=r"diverged in epoch 1 \(loss nan\); lower learning_rate"):
        train(module, lambda inputs, labels: module(*inputs).sum() * torch.nan, FAST, context_of(tiny_base(), tmp_path))


def test_an_empty_train_split_is_an_error(tmp_path: Path) -> None:
    module, base = TinyNet(), tiny_base()
    empty = TinyBase(base.teacher, (base.inputs[0][:0],), None)
    with pytest.raises(PassFailed, match="base 'tiny' has no rows in its train split"):
        train(module, cross_entropy(module), FAST, context_of(empty, tmp_path))


def test_fewer_rows_than_a_batch_make_one_step(tmp_path: Path) -> None:
    module, steps = lively(TinyNet(), seed=7), []
    context = context_of(tiny_base(5), tmp_path, lambda done, total, note="": steps.append((done, total)))
    train(module, cross_entropy(module), FAST, context)
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_bf16_is_chosen_only_where_the_cpu_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    automatic = TrainingOptions()
    assert automatic.resolved_precision(frozenset({"avx2"})) == "float32"
    assert {automatic.resolved_precision(frozenset({flag})) for flag in FAST_BF16} == {"bf16"}
    assert TrainingOptions(precision="bf16").resolved_precision(frozenset()) == "bf16"
    seen: set[torch.dtype] = set()
    for precision in ("float32", "bf16"):
        module = lively(TinyNet(), seed=7)
        module.get_submodule("conv").register_forward_hook(lambda _, __, output: seen.add(output.dtype))
        options = TrainingOptions.model_validate({"epochs": 1, "precision": precision})
        train(module, cross_entropy(module), options, context_of(tiny_base(), tmp_path / precision))
        assert {weight.dtype for weight in module.parameters()} == {torch.float32}
    assert seen == {torch.float32, torch.bfloat16}


def test_training_restores_threads_and_the_random_state(tmp_path: Path) -> None:
    module, base = lively(TinyNet(), seed=7), tiny_base()
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    train(module, cross_entropy(module), FAST, context_of(base, tmp_path))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentations_move_images_and_leave_other_inputs_alone() -> None:
    torch.manual_seed(0)
    images, ids = torch.full((6, 1, 32, 32), -2.0), torch.arange(12).view(6, 2)
    images[:, :, 12:20, 12:20] = 3
    for name, augment in AUGMENTATIONS.items():
        moved, kept = augment((images, ids))
        assert torch.equal(kept, ids)
        assert torch.equal(moved, images) == (name == "none")
        assert torch.equal(moved[:, :, 0, 0], images[:, :, 0, 0]), "the border is repeated, not filled with zeros"
        assert moved.sum().item() == pytest.approx(images.sum().item(), rel=0.1)
    shifted, turned = (AUGMENTATIONS[name]((images,))[0] for name in ("shift", "affine"))
    assert len({tuple(image.argmax().unsqueeze(0).tolist()) for image in shifted}) > 1, "each image moves by itself"
    area = [(warped > 0.5).sum((1, 2, 3)).float().std() for warped in (shifted, turned)]
    assert area[1] > area[0], "only affine changes sizes"
