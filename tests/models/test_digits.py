"""The base `digits`: its splits, its accuracy, and the training that can be interrupted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from leanserve_models import digits
from leanserve_models.residual import ResidualNet
from leanserve_models.train_digits import Recipe, distort, learning_rate, main, train

FIRST_LABELS = {"train": "256784309125", "calibration": "905436721980", "gate": "942068153794", "test": "731650284973"}
SPLITS: tuple[digits.Split, ...] = ("train", "calibration", "gate", "test")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny operations wait longer for a second thread than they take, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def network() -> ResidualNet:
    return digits.build()


def logits(network: ResidualNet, images: digits.Array) -> digits.Array:
    with torch.inference_mode():
        return np.asarray(network(torch.from_numpy(images)).numpy())


def test_splits_share_no_image_and_cover_the_set() -> None:
    images = {split: {image.tobytes() for image in digits.images(split)[0]} for split in SPLITS}
    assert all(images[one].isdisjoint(images[other]) for one, other in combinations(SPLITS, 2))
    assert sum(len(digits.images(split)[0]) for split in SPLITS) == 1797


def test_splits_are_the_same_in_every_process() -> None:
    first_labels = {split: "".join(map(str, digits.images(split, 12)[1])) for split in SPLITS}
    assert first_labels == FIRST_LABELS


@pytest.mark.parametrize("split", SPLITS)
def test_every_prefix_of_a_split_is_stratified(split: digits.Split) -> None:
    for rows in (50, 100, None):
        counts = np.bincount(digits.images(split, rows)[1], minlength=10)
        assert counts.max() - counts.min() <= (5 if rows is None else 2)


def test_a_prefix_of_the_data_has_the_declared_type() -> None:
    (images,), labels = digits.data("gate", 7)
    (whole,), _ = digits.data("gate")
    assert images.shape == (7, *digits.INPUTS[0]["shape"])
    assert images.dtype == digits.INPUTS[0]["dtype"]
    assert labels.shape == (7,)
    np.testing.assert_array_equal(images, whole[:7])


def test_the_declared_normalisation_is_that_of_the_training_images() -> None:
    (images,), _ = digits.data("train")
    assert abs(float(images.mean())) < 0.001
    assert abs(float(images.std()) - 1) < 0.001


def test_the_committed_weights_read_the_test_split(network: ResidualNet) -> None:
    (images,), labels = digits.data("test")
    assert digits.score((logits(network, images),), labels) >= 0.985


def test_score_is_the_share_of_right_answers() -> None:
    assert digits.score((np.eye(4, dtype=np.float32),), np.array([0, 1, 2, 0])) == 0.75


def test_a_row_is_answered_alike_alone_and_in_company(network: ResidualNet) -> None:
    (images,), _ = digits.data("gate", 9)
    together = logits(network, images)
    alone = np.concatenate([logits(network, images[row : row + 1]) for row in range(len(images))])
    np.testing.assert_allclose(alone, together, atol=1e-4)


def test_the_network_has_the_documented_size(network: ResidualNet) -> None:
    assert sum(weight.numel() for weight in network.parameters()) == 1_084_010
    assert digits.WEIGHTS.stat().st_size <= 5_000_000
    assert not network.training
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}


RECIPE = Recipe(epochs=3, batch=16)


def trained(checkpoint: Path, recipe: Recipe = RECIPE, stop_after: int | None = None) -> tuple[torch.Tensor, list[int]]:
    """Weights of a tiny network and the epochs that this run trained; `stop_after` interrupts it."""
    torch.manual_seed(0)
    network = ResidualNet(channels=1, classes=10, widths=(4,), blocks=1)
    (images,), labels = digits.data("train", 64)
    epochs: list[int] = []

    def report(done: int, loss: float) -> None:
        epochs.append(done)
        if done == stop_after:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        train(network, torch.from_numpy(images), torch.from_numpy(labels), recipe, checkpoint, report)
    return network.head.weight.detach().clone(), epochs


def test_training_resumed_after_an_interruption_gives_the_same_weights(tmp_path: Path) -> None:
    whole, _ = trained(tmp_path / "whole.pt")
    interrupted, _ = trained(tmp_path / "cut.pt", stop_after=2)
    resumed, epochs = trained(tmp_path / "cut.pt")
    assert epochs == [3]
    assert not torch.allclose(interrupted, whole)
    torch.testing.assert_close(resumed, whole)


def test_a_checkpoint_of_another_recipe_is_not_resumed(tmp_path: Path) -> None:
    trained(tmp_path / "cut.pt", stop_after=2)
    _, epochs = trained(tmp_path / "cut.pt", Recipe(epochs=3, batch=16, seed=1))
    assert epochs == [1, 2, 3]


def test_learning_rate_rises_and_falls_to_zero() -> None:
    recipe = Recipe(peak_rate=0.2, warm_up=0.25)
    rates = [learning_rate(recipe, progress) for progress in (0, 0.125, 0.25, 0.625, 1)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.1, 0])


def test_distortion_moves_the_ink_and_keeps_the_paper_black() -> None:
    (images,), _ = digits.data("train", 8)
    given = torch.from_numpy(images)
    moved = distort(given, torch.Generator().manual_seed(1))
    again = distort(given, torch.Generator().manual_seed(1))
    torch.testing.assert_close(moved, again, rtol=0, atol=0)
    assert float(moved.amin()) == pytest.approx(float(given.amin()), abs=1e-5)
    assert float((moved - given).abs().mean()) > 0.05


def test_the_training_command_writes_weights_that_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights.safetensors"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(digits, "architecture", lambda: ResidualNet(channels=1, classes=10, widths=(2,), blocks=1))
    monkeypatch.setattr(sys, "argv", ["train_digits", "--epochs", "1", "--out", str(weights)])
    main()
    monkeypatch.setattr(digits, "WEIGHTS", weights)
    (images,), labels = digits.data("gate")
    score = digits.score((logits(digits.build(), images),), labels)
    assert f"gate {score:.2%}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["weights.safetensors"]


def test_the_training_command_refuses_to_train_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_digits", "--epochs", "0"])
    with pytest.raises(SystemExit):
        main()
    assert "--epochs must be at least 1, got 0" in capsys.readouterr().err
