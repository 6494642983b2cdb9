"""`python -m leanserve_models.train_digits`: train the weights of the base `digits`, so that nobody has to trust a
binary file.

A fixed recipe, chosen without looking at the test split: SGD with a cosine schedule and label smoothing; each image
is turned, scaled and shifted a little anew in every epoch. Everything random comes from the seed and the number of the
epoch, so that an interrupted run, started again, goes on from its last epoch to the weights of an undisturbed one.
(Same weights to the bit needs the same machine and number of threads.)
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from leanserve_models import digits

CHECKPOINT = Path(".leanserve") / "train-digits" / "checkpoint.safetensors"


@dataclass(frozen=True)
class Recipe:
    """What decides the trained weights, besides the data and the architecture."""

    epochs: int = 40
    batch: int = 64
    peak_rate: float = 0.1
    weight_decay: float = 5e-4
    smoothing: float = 0.05
    warm_up: float = 0.1
    """Share of the steps in which the learning rate rises to its peak."""
    seed: int = 0


Report = Callable[[int, float], None]
"""Told after every epoch how many are done and the epoch's mean loss."""


def train(network: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, checkpoint: Path, report: Report) -> None:
    """Train `network` in place on images [N, 1, H, W]; resume from `checkpoint` if it is of the same recipe."""
    optimizer = torch.optim.SGD(
        network.parameters(), lr=recipe.peak_rate, momentum=0.9, weight_decay=recipe.weight_decay, nesterov=True
    )
    start = _resume(checkpoint, recipe, network, optimizer)
    network.train()
    for epoch in range(start, recipe.epochs):
        loss = _epoch(network, images, labels, recipe, optimizer, epoch)
        _save(checkpoint, epoch + 1, recipe, network, optimizer)
        report(epoch + 1, loss)
    network.eval()


def learning_rate(recipe: Recipe, progress: float) -> float:
    """Learning rate at `progress` 0..1 through the run: a linear rise, then half a cosine down to zero."""
    if progress < recipe.warm_up:
        return recipe.peak_rate * progress / recipe.warm_up
    return recipe.peak_rate * 0.5 * (1 + math.cos(math.pi * (progress - recipe.warm_up) / (1 - recipe.warm_up)))


def distort(images: Tensor, random: torch.Generator) -> Tensor:
    """Turn (15 degrees), scale (15 %), shear (10 degrees) and shift (8 %) each image within these limits."""
    rows = len(images)
    angle, scale, shear, shift_x, shift_y = (2 * torch.rand(5, rows, generator=random) - 1) * torch.tensor(
        [[math.radians(15)], [0.15], [math.radians(10)], [0.16], [0.16]]
    )
    cos, sin, scale = angle.cos(), angle.sin(), 1 + scale
    first = torch.stack([scale * cos, scale * (shear.tan() * cos - sin), shift_x], dim=1)
    second = torch.stack([scale * sin, scale * (shear.tan() * sin + cos), shift_y], dim=1)
    grid = F.affine_grid(torch.stack([first, second], dim=1), list(images.shape), align_corners=False)
    paper = images.amin()  # the sampler fills with zeros, which is not black once the images are normalised
    return F.grid_sample(images - paper, grid, align_corners=False) + paper


def _epoch(
    network: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, optimizer: torch.optim.Optimizer, epoch: int
) -> float:
    random = torch.Generator().manual_seed(recipe.seed * 100_003 + epoch)
    batches = torch.randperm(len(images), generator=random).chunk(math.ceil(len(images) / recipe.batch))
    total = 0.0
    for step, rows in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, (epoch + (step + 1) / len(batches)) / recipe.epochs)
        batch = distort(images[rows], random).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(network(batch), labels[rows], label_smoothing=recipe.smoothing)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.item() * len(rows)
    return total / len(images)


def _resume(checkpoint: Path, recipe: Recipe, network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the checkpoint and return its epoch; 0 if there is none or it belongs to another recipe."""
    if not checkpoint.exists():
        return 0
    with safe_open(checkpoint, framework="pt") as file:
        told = json.loads(file.metadata()["told"])
    if told["recipe"] != asdict(recipe):
        return 0
    tensors = load_file(checkpoint)
    network.load_state_dict({name: tensors[f"network.{name}"] for name in network.state_dict()})
    for index, parameter in enumerate(network.parameters()):
        optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(tensors[f"momentum.{index}"])
    return int(told["epoch"])


def _save(checkpoint: Path, epoch: int, recipe: Recipe, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for index, parameter in enumerate(network.parameters()):
        tensors[f"momentum.{index}"] = optimizer.state[parameter]["momentum_buffer"]
    told = json.dumps({"epoch": epoch, "recipe": asdict(recipe)})
    _replace(checkpoint, save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"told": told}))


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that an interruption leaves the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_bytes(content)
    fresh.replace(path)


def accuracy(network: nn.Module, split: digits.Split) -> float:
    """Top-1 accuracy of the network on a split, 0..1."""
    (images,), labels = digits.data(split)
    with torch.inference_mode():
        return digits.score((network(torch.from_numpy(images)).numpy(),), labels)


def main() -> None:
    """Train, report the accuracy on the splits that took no part, and replace the weights file."""
    parser = argparse.ArgumentParser(
        prog="python -m leanserve_models.train_digits", description="Train the base `digits`."
    )
    parser.add_argument("--epochs", type=int, default=Recipe.epochs, help="passes over the 997 training images")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="decides initial weights, order and distortions")
    parser.add_argument("--out", type=Path, default=digits.WEIGHTS, help="where the weights go (safetensors)")
    options = parser.parse_args()
    if options.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {options.epochs}")
    recipe = Recipe(epochs=options.epochs, seed=options.seed)

    torch.manual_seed(recipe.seed)
    network = digits.architecture()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast on CPUs
    (images,), labels = digits.data("train")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs, left"))
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("training digits", total=recipe.epochs)

        def report(done: int, loss: float) -> None:
            progress.update(task, completed=done, description=f"training digits, loss {loss:.3f}")

        train(network, torch.from_numpy(images), torch.from_numpy(labels), recipe, CHECKPOINT, report)
    # safetensors demands the default memory layout
    _replace(options.out, save({name: tensor.contiguous() for name, tensor in network.state_dict().items()}))
    CHECKPOINT.unlink(missing_ok=True)
    print(f"{options.out}: gate {accuracy(network, 'gate'):.2%}, test {accuracy(network, 'test'):.2%}")


if __name__ == "__main__":
    main()
