"""The loop, and that it carries what other ways of training need: each is an objective or a callback here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from leanserve.contracts import ArrayData, BuildContext, RowsTogether, TorchModel
from leanserve.errors import PassFailed
from leanserve.hardware import Gpu, Hardware
from leanserve.passes.toolkit.callbacks import EarlyStop, MovingAverage, usual_callbacks
from leanserve.passes.toolkit.checkpoint import as_part
from leanserve.passes.toolkit.masks import KeepMasks, masks_of
from leanserve.passes.toolkit.teacher import MatchTeacher, TeacherTerms
from leanserve.passes.toolkit.training import train
from leanserve.passes.toolkit.training_options import FAST_BF16, TrainingOptions
from leanserve.passes.toolkit.training_run import Objective, Trained, TrainingCallback, TrainingRun
from leanserve.runtime.formats.torch import training_device
from tiny_base import IMAGES, TinyBase, TinyNet, context_of, lively, no_progress, tiny_base

FAST = TrainingOptions(epochs=4, batch=16, precision="float32")


class Plain(Objective):
    """A loss that is a function."""

    def __init__(self, function: Callable[[tuple[torch.Tensor, ...], torch.Tensor | None], torch.Tensor]) -> None:
        self._function = function

    def loss(self, inputs: tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> torch.Tensor:
        return self._function(inputs, labels)


def cross_entropy(module: nn.Module) -> Objective:
    def loss(inputs: tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> torch.Tensor:
        assert labels is not None
        return nn.functional.cross_entropy(module(*inputs), labels)

    return Plain(loss)


def run(
    module: nn.Module,
    objective: Objective,
    options: TrainingOptions,
    context: BuildContext,
    callbacks: Sequence[TrainingCallback] = (),
) -> Trained:
    return train(module, objective, context.base.data("train"), options, callbacks, context)


def trained(scratch: Path, options: TrainingOptions = FAST, seed: int = 0) -> nn.Module:
    module = lively(TinyNet(), seed=7)
    run(module, cross_entropy(module), options, context_of(tiny_base(), scratch, seed=seed))
    return module


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("optimiser", ["adamw", "sgd"])
def test_training_lowers_the_loss_and_ends_in_eval_mode(tmp_path: Path, optimiser: str) -> None:
    module = lively(TinyNet(), seed=7)
    options = TrainingOptions.model_validate({"epochs": 5, "batch": 16, "optimiser": optimiser, "learning_rate": 0.01})
    outcome = run(module, cross_entropy(module), options, context_of(tiny_base(), tmp_path))
    assert outcome.last_loss < 0.7 * outcome.first_loss
    assert outcome.resumed_from == 0
    assert not module.training


@pytest.mark.parametrize("rows", ["one", "one_length"])
def test_what_must_not_share_a_batch_is_not_trained_in_batches(tmp_path: Path, rows: RowsTogether) -> None:
    base = tiny_base()
    apart = replace(base, spec=replace(base.spec, rows=rows))
    module = lively(TinyNet(), seed=7)
    with pytest.raises(PassFailed, match=rf"training runs batches of any rows, and base\.rows: {rows} says"):
        run(module, cross_entropy(module), FAST, context_of(apart, tmp_path))


def test_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    options = TrainingOptions(epochs=2, batch=16, augment=("affine",), precision="float32")
    first, again, other = (trained(tmp_path / name, options, seed) for name, seed in [("a", 3), ("b", 3), ("c", 4)])
    assert equal(first, again)
    assert not equal(first, other)


@pytest.mark.parametrize("step", [1, 9, 14])
def test_an_interrupted_run_ends_in_the_weights_of_an_undisturbed_one(tmp_path: Path, step: int) -> None:
    options = TrainingOptions(epochs=4, batch=16, augment=("shift",), precision="float32")
    whole = trained(tmp_path / "whole", options)

    def interrupt(done: float, total: float, note: str = "") -> None:
        if done == step:
            raise KeyboardInterrupt

    module = lively(TinyNet(), seed=7)
    with pytest.raises(KeyboardInterrupt):
        run(module, cross_entropy(module), options, context_of(tiny_base(), tmp_path, interrupt))
    module = lively(TinyNet(), seed=7)
    seen: list[float] = []
    watch = context_of(tiny_base(), tmp_path, lambda done, total, note="": seen.append(done))
    outcome = run(module, cross_entropy(module), options, watch)
    assert equal(module, whole)
    assert outcome.resumed_from == (step - 1) // 4
    assert seen == list(range(4 * outcome.resumed_from + 1, 17)), "67 rows are 4 whole batches of 16"


def test_a_checkpoint_of_other_options_is_not_used(tmp_path: Path) -> None:
    trained(tmp_path)
    module = lively(TinyNet(), seed=7)
    other = FAST.model_copy(update={"epochs": 5})
    assert run(module, cross_entropy(module), other, context_of(tiny_base(), tmp_path)).resumed_from == 0


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
    masks = KeepMasks(masks_of(TorchModel(module, IMAGES)))
    run(module, cross_entropy(module), FAST, context_of(tiny_base(), tmp_path), [masks])
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

    run(module, Plain(flat), options, context_of(tiny_base(), tmp_path))
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
        run(
            module,
            Plain(lambda inputs, labels: module(*inputs).sum() * torch.nan),
            FAST,
            context_of(tiny_base(), tmp_path),
        )


def test_an_empty_train_split_is_an_error(tmp_path: Path) -> None:
    module, base = TinyNet(), tiny_base()
    empty = TinyBase(base.teacher, (base.inputs[0][:0],), None)
    with pytest.raises(PassFailed, match="base 'tiny' has no rows in its train split"):
        run(module, cross_entropy(module), FAST, context_of(empty, tmp_path))


def test_fewer_rows_than_a_batch_make_one_step(tmp_path: Path) -> None:
    module, steps = lively(TinyNet(), seed=7), []
    context = context_of(tiny_base(5), tmp_path, lambda done, total, note="": steps.append((done, total)))
    run(module, cross_entropy(module), FAST, context)
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_bf16_is_chosen_only_where_the_cpu_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    automatic = TrainingOptions()
    context = context_of(tiny_base(), tmp_path)

    def on(*isa: str, device: str = "cpu") -> BuildContext:
        return replace(context, hardware=Hardware("a processor", 1, isa), device=device)

    assert automatic.resolved_precision(on("avx2")) == "float32"
    assert {automatic.resolved_precision(on(flag)) for flag in FAST_BF16} == {"bf16"}
    assert automatic.resolved_precision(on("avx2", device="cuda:0")) == "bf16"
    assert TrainingOptions(precision="bf16").resolved_precision(on()) == "bf16"
    seen: set[torch.dtype] = set()
    for precision in ("float32", "bf16"):
        module = lively(TinyNet(), seed=7)
        module.get_submodule("conv").register_forward_hook(lambda _, __, output: seen.add(output.dtype))
        options = TrainingOptions.model_validate({"epochs": 1, "precision": precision})
        run(module, cross_entropy(module), options, context_of(tiny_base(), tmp_path / precision))
        assert {weight.dtype for weight in module.parameters()} == {torch.float32}
    assert seen == {torch.float32, torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
def test_a_gpu_trains_and_leaves_the_model_on_the_cpu(tmp_path: Path) -> None:
    base = tiny_base()
    context = replace(context_of(base, tmp_path), device="cuda:0")
    student = TorchModel(lively(TinyNet(), seed=7), base.spec)
    options = TrainingOptions(epochs=4, batch=16, ema=0.5, patience=4, precision="float32")
    objective = MatchTeacher(student, base, TeacherTerms())
    where: set[str] = set()
    student.module.get_submodule("conv").register_forward_hook(lambda _, __, output: where.add(output.device.type))
    callbacks = usual_callbacks(student, options, context)
    found = train(student.module, objective, base.data("train"), options, callbacks, context)
    assert where == {"cuda"}
    assert found.last_loss < found.first_loss
    assert {tensor.device.type for tensor in student.module.state_dict().values()} == {"cpu"}


def test_a_gpu_is_taken_where_torch_can_use_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu = Hardware("a processor", 1, gpus=(Gpu("a card", 2**34),))
    for usable, device in ((True, "cuda:0"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda usable=usable: usable)
        assert training_device(with_gpu) == device
        assert training_device(Hardware("a processor", 1)) == "cpu"


def test_training_restores_threads_and_the_random_state(tmp_path: Path) -> None:
    module, base = lively(TinyNet(), seed=7), tiny_base()
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    run(module, cross_entropy(module), FAST, context_of(base, tmp_path))
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


class Interrupted(Exception):
    """Where a test stops a training."""


def interrupt_at(step: int) -> Callable[..., None]:
    def told(done: float, total: float, note: str = "") -> None:
        if done == step:
            raise Interrupted

    return told


def resumed(make: Callable[[], tuple[nn.Module, Objective, Sequence[TrainingCallback]]], tmp_path: Path) -> None:
    """Whatever takes part, a run that was interrupted in its third epoch ends like an undisturbed one."""
    results: list[dict[str, torch.Tensor]] = []
    starts = []
    for folder, interruptions in (("whole", [None]), ("twice", [10, None])):
        for step in interruptions:
            module, objective, callbacks = make()
            told = no_progress if step is None else interrupt_at(step)
            context = context_of(tiny_base(), tmp_path / folder, told)
            try:
                outcome = run(module, objective, FAST, context, callbacks)
            except Interrupted:
                assert step is not None
        extra = objective.extra()
        results.append({**module.state_dict(), **({} if extra is None else as_part(extra.state_dict(), "extra"))})
        starts.append(outcome.resumed_from)
    assert starts == [0, 2]
    for name, value in results[0].items():
        if not isinstance(value, torch.Tensor):
            continue
        assert torch.equal(value, results[1][name]), name


class Sharpness(TrainingCallback):
    """SAM (Foret et al. 2021): the gradient is that of the worst weights within `rho`."""

    def __init__(self, rho: float) -> None:
        self._rho = rho

    def gradients(self, run: TrainingRun, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        loss = compute()
        weights = [weight for weight in run.module.parameters() if weight.grad is not None]
        gradients = [weight.grad.clone() for weight in weights if weight.grad is not None]
        length = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        before = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.add_(self._rho * gradient / length)
        compute()
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)
        return loss


def test_sharpness_aware_gradients_equal_those_computed_by_hand(tmp_path: Path) -> None:
    weight, rho, rate = torch.tensor([[1.0, -2.0]]), 0.5, 0.1
    inputs = np.array([[3.0, 1.0], [0.5, 2.0]], np.float32)
    base = TinyBase(nn.Linear(2, 1), (inputs,), None)
    module = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(weight)
    options = TrainingOptions(
        epochs=1, batch=2, optimiser="sgd", learning_rate=rate, warmup=0.0, weight_decay=0.0, precision="float32"
    )
    outcome = run(
        module,
        Plain(lambda inputs, labels: module(*inputs).square().mean()),
        options,
        context_of(base, tmp_path),
        [Sharpness(rho)],
    )
    x = torch.from_numpy(inputs)

    def gradient(weight: torch.Tensor) -> torch.Tensor:
        """Of mean((x w)^2) by w: 2 w (x^T x) / rows."""
        return 2 * weight @ (x.T @ x) / len(x)

    first = gradient(weight)
    second = gradient(weight + rho * first / first.norm())
    assert not torch.allclose(first, second)
    step = 1.9 * rate * second  # Nesterov's first step with momentum 0.9
    torch.testing.assert_close(module.weight.detach(), weight - step)
    assert outcome.first_loss == pytest.approx(float((x @ weight.T).square().mean())), "of the weights as they were"


class GradualPruning(KeepMasks):
    """Zhu and Gupta 2017: the share of zeros rises along a cubic to its target, weakest weights first."""

    def __init__(self, target: float, names: Sequence[str]) -> None:
        super().__init__({})
        self._target = target
        self._names = names

    def end_step(self, run: TrainingRun) -> None:
        if run.step % 2 == 0:
            share = self._target * (1 - (1 - min(1.0, 2 * run.step / run.steps)) ** 3)
            for name in self._names:
                size = run.module.get_parameter(name).abs()
                if name in self.masks:
                    size[~self.masks[name]] = -1
                cut = size.flatten().kthvalue(max(1, round(share * size.numel()))).values
                self.masks[name] = size > cut
        super().end_step(run)


def test_gradual_pruning_is_a_callback_whose_masks_hold_through_training_and_resuming(tmp_path: Path) -> None:
    made: list[GradualPruning] = []

    def make() -> tuple[nn.Module, Objective, Sequence[TrainingCallback]]:
        module = lively(TinyNet(), seed=7)
        made.append(GradualPruning(0.75, ["conv.weight", "stem.weight"]))
        return module, cross_entropy(module), [made[-1]]

    resumed(make, tmp_path)
    assert all(torch.equal(mask, made[-1].masks[name]) for name, mask in made[0].masks.items())
    module, objective, callbacks = make()
    shares = []

    class Watch(TrainingCallback):
        def end_step(self, run: TrainingRun) -> None:
            weight = run.module.get_parameter("conv.weight")
            shares.append(1 - weight.count_nonzero().item() / weight.numel())

    run(module, objective, FAST, context_of(tiny_base(), tmp_path / "watched"), [*callbacks, Watch()])
    assert shares == sorted(shares), "what is cut stays cut"
    assert shares[1] < shares[3] < shares[-1] == pytest.approx(0.75, abs=0.01)
    model = TorchModel(module, IMAGES, made[-1].masks)
    again = KeepMasks(masks_of(model))
    run(module, cross_entropy(module), FAST, context_of(tiny_base(), tmp_path / "later"), [again])
    assert 1 - module.get_parameter("conv.weight").count_nonzero().item() / 576 == shares[-1]


class MatchFeatures(Objective):
    """FitNets (Romero et al. 2015): features of another width are compared through a projection, trained along."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self._student = student
        self._teacher = teacher
        self._projection = nn.Conv2d(4, 8, 1)
        lively(self._projection, seed=3)
        self._seen: dict[str, torch.Tensor] = {}
        self.hooks = [self._watch(student, "student"), self._watch(teacher, "teacher")]

    def extra(self) -> nn.Module:
        return self._projection

    def loss(self, inputs: tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> torch.Tensor:
        self._student(*inputs)
        with torch.no_grad():
            self._teacher(*inputs)
        return nn.functional.mse_loss(self._projection(self._seen["student"]), self._seen["teacher"])

    def _watch(self, module: nn.Module, name: str) -> Any:
        return module.get_submodule("norm").register_forward_hook(
            lambda _, __, output: self._seen.update({name: output})
        )


def test_features_are_matched_through_extra_parameters_that_are_gone_afterwards(tmp_path: Path) -> None:
    objectives = []

    def make() -> tuple[nn.Module, Objective, Sequence[TrainingCallback]]:
        student = lively(TinyNet(width=4), seed=7)
        objectives.append(MatchFeatures(student, tiny_base().torch_module()))
        return student, objectives[-1], ()

    resumed(make, tmp_path)
    student, objective, _ = make()
    names = set(student.state_dict())
    extra = objective.extra()
    assert extra is not None
    before = extra.state_dict()["weight"].clone()
    fast = FAST.model_copy(update={"learning_rate": 0.05})
    outcome = run(student, objective, fast, context_of(tiny_base(), tmp_path / "again"))
    assert outcome.last_loss < 0.8 * outcome.first_loss
    assert not torch.equal(extra.state_dict()["weight"], before), "the projection is trained"
    assert set(student.state_dict()) == names, "and no part of the student"


def test_extra_parameters_have_groups_of_their_own_that_a_callback_may_change(tmp_path: Path) -> None:
    class Frozen(TrainingCallback):
        """No step for the extra parameters."""

        def gradients(self, run: TrainingRun, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
            for group in run.optimiser.param_groups[2:]:
                group["lr"] = 0.0
            return compute()

    student = lively(TinyNet(width=4), seed=7)
    objective = MatchFeatures(student, tiny_base().torch_module())
    before = {name: value.clone() for name, value in objective.extra().state_dict().items()}
    outcome = run(student, objective, FAST, context_of(tiny_base(), tmp_path), [Frozen()])
    assert all(torch.equal(value, before[name]) for name, value in objective.extra().state_dict().items())
    assert outcome.last_loss < outcome.first_loss, "the student learns"


def test_the_moving_average_is_what_training_ends_in(tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(TrainingCallback):
        def end_step(self, run: TrainingRun) -> None:
            seen.append({name: value.clone() for name, value in run.module.state_dict().items()})

    module = lively(TinyNet(), seed=7)
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    run(module, cross_entropy(module), FAST, context_of(tiny_base(), tmp_path), [Watch(), MovingAverage(0.5)])
    for step, weights in enumerate(seen):
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in weights.items():
            expected[name] = decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)
    assert not torch.equal(module.state_dict()["conv.weight"], seen[-1]["conv.weight"])


class Scripted(TrainingCallback):
    """Puts given numbers in the place of what is learnt, one an epoch."""

    def __init__(self, values: Sequence[float]) -> None:
        self._values = values

    def end_epoch(self, run: TrainingRun) -> None:
        with torch.no_grad():
            run.module.get_parameter("weight").fill_(self._values[run.epochs_done - 1])


@pytest.mark.parametrize(
    ("values", "patience", "epochs", "kept"),
    [
        ([5, 3, 4, 4, 1, 0], 2, 4, 3.0),
        ([5, 3, 4, 4, 1, 2], 3, 6, 1.0),
        ([5, 4, 3, 2, 1, 0], 1, 6, 0.0),
        ([5, 5, 4, 3, 2, 1], 1, 2, 5.0),
    ],
)
def test_training_stops_when_the_loss_on_other_rows_falls_no_more_and_keeps_the_best(
    values: list[float], patience: int, epochs: int, kept: float, tmp_path: Path
) -> None:
    rows = ArrayData((np.ones((40, 1), np.float32),))
    base = TinyBase(nn.Linear(1, 1), rows.inputs, None)
    module = nn.Linear(1, 1, bias=False)
    objective = Plain(lambda inputs, labels: module(*inputs).square().mean())
    options = TrainingOptions(epochs=6, batch=40, precision="float32")
    callbacks = [Scripted(values), EarlyStop(rows, patience)]
    context = context_of(base, tmp_path)
    outcome = run(module, objective, options, context, callbacks)
    assert (outcome.epochs, module.weight.item()) == (epochs, kept)
    again = run(module, objective, options, context, [Scripted(values), EarlyStop(rows, patience)])
    assert (again.epochs, again.resumed_from, module.weight.item()) == (epochs, epochs, kept), "it stays stopped"


def test_early_stopping_judges_the_average_and_everything_resumes(tmp_path: Path) -> None:
    masked = {"conv.weight": torch.arange(576).reshape(8, 8, 3, 3) % 3 > 0}

    def make() -> tuple[nn.Module, Objective, Sequence[TrainingCallback]]:
        module = lively(TinyNet(), seed=7)
        options = FAST.model_copy(update={"ema": 0.8, "patience": 2})
        model = TorchModel(module, IMAGES, masked)
        return module, cross_entropy(module), usual_callbacks(model, options, context_of(tiny_base(), tmp_path))

    assert [type(item) for item in make()[2]] == [KeepMasks, EarlyStop, MovingAverage]
    resumed(make, tmp_path)
    module, objective, callbacks = make()
    run(module, objective, FAST, context_of(tiny_base(), tmp_path / "again"), callbacks)
    assert module.get_parameter("conv.weight")[~masked["conv.weight"]].count_nonzero() == 0
    average = callbacks[-1]
    assert isinstance(average, MovingAverage)
    best = {name: value.clone() for name, value in module.state_dict().items()}
    with average.in_place(module):
        ended = {name: value.clone() for name, value in module.state_dict().items()}
    assert all(torch.equal(value, best[name]) for name, value in module.state_dict().items()), "it is put back"
    images, labels = torch.from_numpy(tiny_base().inputs[0]), torch.from_numpy(tiny_base().labels)
    losses = []
    for weights in (best, ended):
        module.load_state_dict(weights)
        losses.append(objective.loss((images,), labels).item())
    assert losses[0] <= losses[1]


class Synthetic:
    """Rows drawn anew by whoever trains without data."""

    def __len__(self) -> int:
        return 32

    def batches(self, size: int, shuffle_seed: int | None = None) -> Iterator[Any]:
        random = np.random.default_rng(shuffle_seed)
        rows = random.standard_normal((len(self), 1, 8, 8)).astype(np.float32)
        yield from ArrayData((rows,)).batches(size)


def test_data_may_come_from_elsewhere_than_the_base(tmp_path: Path) -> None:
    module, teacher = lively(TinyNet(), seed=7), tiny_base().torch_module()
    nothing = replace(tiny_base(), inputs=(np.zeros((0, 1, 8, 8), np.float32),), labels=None)
    objective = Plain(lambda inputs, labels: (module(*inputs) - teacher(*inputs).detach()).square().mean())
    outcome = train(module, objective, Synthetic(), FAST, (), context_of(nothing, tmp_path))
    assert outcome.last_loss < outcome.first_loss


def test_a_checkpoint_of_other_callbacks_is_not_used(tmp_path: Path) -> None:
    trained(tmp_path)
    module = lively(TinyNet(), seed=7)
    context = context_of(tiny_base(), tmp_path)
    assert run(module, cross_entropy(module), FAST, context, [MovingAverage(0.9)]).resumed_from == 0


def test_an_empty_calibration_split_cannot_stop_a_training(tmp_path: Path) -> None:
    empty = replace(tiny_base(), inputs=(np.zeros((0, 1, 8, 8), np.float32),))
    options = TrainingOptions(patience=1)
    with pytest.raises(PassFailed, match="patience: the calibration split, whose loss decides, is empty"):
        usual_callbacks(TorchModel(TinyNet(), IMAGES), options, context_of(empty, tmp_path))


def test_state_besides_tensors_is_left_to_the_module(tmp_path: Path) -> None:
    class Telling(TinyNet):
        def get_extra_state(self) -> Any:
            return object()

        def set_extra_state(self, state: Any) -> None:
            """Nothing of it is stored."""

    def make() -> tuple[nn.Module, Objective, Sequence[TrainingCallback]]:
        torch.manual_seed(0)
        module = Telling()
        return module, cross_entropy(module), [MovingAverage(0.9)]

    resumed(make, tmp_path)
