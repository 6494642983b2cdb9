"""Training with an eye on the neighbourhood: the worst neighbour, the mean of epochs, and how flat it got."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from leanserve.contracts import ArrayData, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.families.distill.train_flat import TrainFlat
from leanserve.passes.toolkit.flatness import Sharpness, WeightAverage, rise_under_noise
from leanserve.passes.toolkit.training import train
from leanserve.passes.toolkit.training_options import TrainingOptions
from leanserve.passes.toolkit.training_run import Objective
from tiny_base import IMAGES, TinyBase, TinyNet, context_of, lively, tiny_base

pytestmark = pytest.mark.usefixtures("one_thread")


def quick(**options: Any) -> TrainFlat:
    return TrainFlat.model_validate({"epochs": 4, "batch": 16, "precision": "float32", **options})


def trained(pass_: TrainFlat, base: TinyBase, folder: Path) -> TorchModel:
    made = pass_.apply(TorchModel(lively(TinyNet(), seed=5), IMAGES), context_of(base, folder)).model
    assert isinstance(made, TorchModel)
    return made


class Bowl(Objective):
    """(w^2)^2 / 4, whose gradient is w^3."""

    def __init__(self, module: nn.Linear) -> None:
        self._weight = module.weight

    def loss(self, inputs: tuple[Tensor, ...], labels: Tensor | None) -> Tensor:
        return (self._weight**4).sum() / 4


def test_sam_steps_by_the_gradient_at_the_worst_neighbour(tmp_path: Path) -> None:
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(2.0)
    options = TrainingOptions(
        epochs=1, batch=4, optimiser="sgd", learning_rate=0.1, weight_decay=0, warmup=0, precision="float32"
    )
    base = tiny_base()
    data = ArrayData((base.inputs[0][:4],))
    train(module, Bowl(module), data, options, [Sharpness(0.5)], context_of(base, tmp_path))
    step = 0.1 * 2.5**3  # the gradient at 2 + rho
    assert module.weight.item() == pytest.approx(2.0 - step * 1.9, abs=1e-5), "Nesterov's first step is 1 + momentum"


def test_sam_counts_a_batch_once_in_batch_norm(tmp_path: Path) -> None:
    counts = [
        int(
            trained(quick(method=method, **extra), tiny_base(), tmp_path / method).module.state_dict()[
                "norm.num_batches_tracked"
            ]
        )
        for method, extra in (("sam", {}), ("ema", {"ema": 0.5}))
    ]
    assert counts[0] == counts[1] > 0


def test_swa_ends_in_the_mean_of_the_epochs_after_its_start(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    rates: list[float] = []

    class Watching(WeightAverage):
        def end_epoch(self, run: Any) -> None:
            super().end_epoch(run)
            seen.append(run.module.weight.detach().clone())
            rates.append(run.optimiser.param_groups[0]["lr"])

    module, base = nn.Linear(1, 1, bias=False), tiny_base()
    options = TrainingOptions(epochs=4, batch=16, learning_rate=0.1, precision="float32")
    data = ArrayData((base.inputs[0],))
    train(module, Bowl(module), data, options, [Watching(0.5)], context_of(base, tmp_path))
    torch.testing.assert_close(module.weight, (seen[2] + seen[3]) / 2)
    assert rates[2] == rates[3] == options.rate(8, 16)


@pytest.mark.parametrize("options", [{"method": "sam", "rho": 0.1}, {"method": "swa"}, {"method": "ema", "ema": 0.9}])
def test_an_interrupted_training_resumes_to_the_same_weights(options: Any, tmp_path: Path) -> None:
    def interrupt(done: float, total: float, note: str = "") -> None:
        if done > 0.8 * total and note.startswith("epoch"):
            raise KeyboardInterrupt

    base, pass_ = tiny_base(), quick(**options)
    with pytest.raises(KeyboardInterrupt):
        pass_.apply(TorchModel(lively(TinyNet(), seed=5), IMAGES), context_of(base, tmp_path, interrupt))
    resumed, whole = trained(pass_, base, tmp_path), trained(pass_, base, tmp_path / "whole")
    for name, value in resumed.module.state_dict().items():
        assert torch.equal(value, whole.module.state_dict()[name]), name


def test_flatness_tells_a_sharp_model_from_a_flat_one() -> None:
    base = tiny_base()
    flat, sharp = TorchModel(base.torch_module(), IMAGES), TorchModel(base.torch_module(), IMAGES)
    flat.module.get_parameter("head.weight").data /= 4
    quieter = replace(base, teacher=flat.module)
    data = base.data("calibration")
    found = rise_under_noise(flat, quieter, data, 0), rise_under_noise(sharp, base, data, 0)
    assert 0 < found[0] < 0.5 * found[1]
    assert rise_under_noise(flat, quieter, data, 0) == found[0]


def test_it_says_how_flat_it_was_and_became(tmp_path: Path) -> None:
    applied = quick().apply(TorchModel(lively(TinyNet(), seed=5), IMAGES), context_of(tiny_base(), tmp_path))
    assert applied.facts.keys() == {"rise_under_noise_before", "rise_under_noise_after"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "swa", "rho": 0.1}, "rho is an option of sam"),
        ({"method": "sam", "start": 0.1}, "start is an option of swa"),
        ({"method": "ema"}, "needs a decay; set ema"),
        ({"method": "swa", "patience": 1}, "drop the option"),
    ],
)
def test_options_of_another_method_are_refused(options: Any, text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        quick(**options)


def test_labels_that_are_not_there_are_asked_for(tmp_path: Path) -> None:
    assert "labels" in quick(alpha=0.5).needs
    assert "labels" not in quick().needs
    spec = replace(IMAGES, labels=())
    with pytest.raises(PassFailed, match="the base has no classes"):
        quick(alpha=0.5).apply(TorchModel(lively(TinyNet(), seed=5), spec), context_of(tiny_base(), tmp_path))
