"""A network on which every pass finds something to do: convolutions with batch norm, attention, linear layers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from leanserve.contracts import ModelSpec, TensorSpec
from stacked_nets import HEADS, WIDTH, Apart, StackLayer
from tiny_base import TinyBase, lively

CHANNELS, SIDE, CLASSES = WIDTH // 2, 8, 10


class Hybrid(nn.Module):
    """A convolutional stem and residual, whose pixels are the tokens of three transformer layers; a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, CHANNELS, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU()
        )
        self.conv1, self.norm1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS)
        self.enter = nn.Conv2d(CHANNELS, WIDTH, 2, stride=2)
        self.layers = nn.ModuleList(StackLayer(Apart(), tuple_=False) for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = torch.relu(x + self.norm1(self.conv1(x)))
        x = self.enter(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x.mean(1))
        return logits


def hybrid_base(rows: int = 40) -> TinyBase:
    """A base around `Hybrid`, whose heads and layers are missed little, as those of a trained network."""
    random = np.random.default_rng(0)
    images = random.standard_normal((rows, 3, SIDE, SIDE)).astype(np.float32)
    spec = ModelSpec(
        (TensorSpec("image", "float32", (3, SIDE, SIDE)),),
        (TensorSpec("logits", "float32", (CLASSES,), meaning="logits"),),
    )
    module = lively(Hybrid(), seed=1)
    with torch.no_grad():
        for layer in module.get_submodule("layers").children():
            layer.get_parameter("out.weight")[:, : WIDTH // HEADS] *= 1e-3
            layer.get_parameter("down.weight")[:, ::2] *= 1e-3
    return TinyBase(module, (images,), random.integers(0, CLASSES, rows), spec)
