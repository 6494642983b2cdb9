"""Small networks with what pruning and factorising get wrong: residual sums, depthwise and grouped convolutions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from leanserve.contracts import ModelSpec, TensorSpec
from tiny_base import TinyBase, lively

SIDE = 12


class Residual(nn.Module):
    """Wide enough to prune by 16: a stem, a residual block, a projection, a classifier."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))
        x = torch.relu(self.down(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Mobile(nn.Module):
    """An inverted residual with a depthwise and a grouped convolution."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.norm = nn.BatchNorm2d(2 * width)
        self.project = nn.Conv2d(2 * width, width, 1)
        self.grouped = nn.Conv2d(width, 2 * width, 3, padding=1, groups=4)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.stem(image))
        x = x + self.project(torch.relu(self.norm(self.depthwise(torch.relu(self.expand(x))))))
        x = torch.relu(self.grouped(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Perceptron(nn.Module):
    """Rows of 24 numbers through two wide layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 64)
        self.norm = nn.BatchNorm1d(64)
        self.second = nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, row: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(row)))
        logits: Tensor = self.head(torch.relu(self.second(x)))
        return logits


class Reshaping(nn.Module):
    """Its code knows the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv(image).reshape(-1, 32, SIDE * SIDE) * torch.ones(32, 1)
        logits: Tensor = self.head(x.mean(2))
        return logits


def image_base(module: nn.Module, rows: int = 70) -> TinyBase:
    """A base around `module` with neighbouring pixels and colours that are correlated, as in images."""
    random = np.random.default_rng(0)
    coarse = random.standard_normal((rows, 3, SIDE // 3, SIDE // 3))
    images = coarse.repeat(3, 2).repeat(3, 3) + 0.3 * random.standard_normal((rows, 3, SIDE, SIDE))
    spec = ModelSpec(
        (TensorSpec("image", "float32", (3, SIDE, SIDE)),), (TensorSpec("logits", "float32", (10,), meaning="logits"),)
    )
    return TinyBase(lively(module, seed=1), (images.astype(np.float32),), random.integers(0, 10, rows), spec)


def row_base(rows: int = 70) -> TinyBase:
    """A base around `Perceptron` whose inputs live near a plane of 6 dimensions."""
    random = np.random.default_rng(0)
    values = random.standard_normal((rows, 6)) @ random.standard_normal((6, 24))
    values += 0.05 * random.standard_normal((rows, 24))
    spec = ModelSpec(
        (TensorSpec("row", "float32", (24,)),), (TensorSpec("logits", "float32", (10,), meaning="logits"),)
    )
    return TinyBase(lively(Perceptron(), seed=2), (values.astype(np.float32),), random.integers(0, 10, rows), spec)


def answers(module: nn.Module, base: TinyBase) -> Tensor:
    """The module's outputs on the base's data."""
    with torch.no_grad():
        outputs: Tensor = module(torch.tensor(base.inputs[0]))
    return outputs
