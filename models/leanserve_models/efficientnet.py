"""EfficientNet-Lite0: the architecture behind the base `efficientnet_lite0`.

Inverted residuals with depthwise convolutions (Tan & Le, "EfficientNet", ICML 2019), in the Lite variant that Google
made for phones and integer arithmetic (2020): no squeeze-and-excite, ReLU6 instead of swish. Convolutions are padded as
in TensorFlow, where the weights come from: at stride 2 the odd pixel goes to the right and the bottom.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from torch import Tensor, nn

EPSILON = 1e-3
"""Of the batch norms; torch's default is 1e-5."""


class Stage(NamedTuple):
    """Blocks of one width; only the first of them has the stride."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    width: int


STAGES = (
    Stage(blocks=1, kernel=3, stride=1, expansion=1, width=16),
    Stage(blocks=2, kernel=3, stride=2, expansion=6, width=24),
    Stage(blocks=2, kernel=5, stride=2, expansion=6, width=40),
    Stage(blocks=3, kernel=3, stride=2, expansion=6, width=80),
    Stage(blocks=3, kernel=5, stride=1, expansion=6, width=112),
    Stage(blocks=4, kernel=5, stride=2, expansion=6, width=192),
    Stage(blocks=1, kernel=3, stride=1, expansion=6, width=320),
)
STEM, HEAD = 32, 1280


class InvertedResidual(nn.Module):
    """1x1 convolution to many channels, a depthwise one, 1x1 back to few; a shortcut where the shape stays."""

    def __init__(self, width_in: int, stage: Stage, stride: int) -> None:
        super().__init__()
        wide = width_in * stage.expansion
        self.expand = _conv(width_in, wide, 1) if stage.expansion > 1 else nn.Identity()
        self.depthwise = _conv(wide, wide, stage.kernel, stride, groups=wide)
        self.project = _conv(wide, stage.width, 1)[:-1]  # no activation: on few channels it would lose too much
        self.shortcut = stride == 1 and width_in == stage.width

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.depthwise(self.expand(x)))
        return out + x if self.shortcut else out


class EfficientNetLite0(nn.Module):
    """Image [N, 3, H, W], sides divisible by 32 -> logits [N, classes]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = _conv(3, STEM, 3, stride=2)
        self.blocks = nn.Sequential()
        width = STEM
        for stage in STAGES:
            for index in range(stage.blocks):
                self.blocks.append(InvertedResidual(width, stage, stage.stride if index == 0 else 1))
                width = stage.width
        self.head = _conv(width, HEAD, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(HEAD, classes)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.pool(self.head(self.blocks(self.stem(x))))
        logits: Tensor = self.classifier(features.flatten(1))
        return logits


def _conv(width_in: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm and ReLU6; the sides of the image must be divisible by the stride."""
    half = (kernel - 1) // 2
    layers: dict[str, nn.Module] = {}
    if stride == 2:
        layers["pad"] = nn.ZeroPad2d((half - 1, half, half - 1, half))
    padding = 0 if stride == 2 else half
    layers["conv"] = nn.Conv2d(width_in, width, kernel, stride, padding, groups=groups, bias=False)
    layers["norm"] = nn.BatchNorm2d(width, EPSILON)
    layers["activation"] = nn.ReLU6()
    return nn.Sequential(OrderedDict(layers))
