"""A base that trains in a second: 8x8 images of two classes, told apart by the half that is bright."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from leanserve.contracts import (
    Array,
    ArrayData,
    Arrays,
    Base,
    BuildContext,
    Codec,
    ModelSpec,
    Progress,
    Split,
    TensorSpec,
    TorchModel,
)
from leanserve.evaluation.candidates import CandidateEvaluator
from leanserve.hardware import this_hardware

IMAGES = ModelSpec(
    (TensorSpec("image", "float32", (1, 8, 8)),),
    (TensorSpec("logits", "float32", (2,), meaning="logits"),),
    ("left", "right"),
)


class TinyNet(nn.Module):
    """A residual block between a stem and a classifier; batch norm everywhere."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width * 4, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem_norm(self.stem(image)))
        x = torch.relu(x + self.norm(self.conv(x)))
        logits: torch.Tensor = self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))
        return logits


@dataclass(frozen=True)
class TinyBase:
    """`contracts.Base` around a given teacher and given data."""

    teacher: nn.Module
    inputs: Arrays
    labels: Array | None
    spec: ModelSpec = IMAGES
    name: str = "tiny"
    origin: str = "tiny"
    digest: str = "0"
    caveats: tuple[str, ...] = ()
    unit: int = 1
    scored_as: str = "accuracy"
    score_digest: str = ""

    @property
    def codec(self) -> Codec:
        raise NotImplementedError("no test of a pass decodes requests")

    def codec_for(self, spec: ModelSpec) -> Codec:
        return self.codec

    def model(self) -> TorchModel:
        return TorchModel(self.torch_module(), self.spec)

    def torch_module(self) -> nn.Module:
        return copy.deepcopy(self.teacher).eval()

    def data(self, split: Split, n: int | None = None, spec: ModelSpec | None = None) -> ArrayData:
        return ArrayData(tuple(array[:n] for array in self.inputs), None if self.labels is None else self.labels[:n])

    def score(self, outputs: Arrays, labels: Array) -> float:
        return float((outputs[0].argmax(1) == labels).mean())


def tiny_base(rows: int = 67) -> TinyBase:
    """A base whose teacher has random weights and batch statistics that matter. 67 rows leave a ragged last batch."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, rows)
    images = random.standard_normal((rows, 1, 8, 8)).astype(np.float32)
    for image, label in zip(images, labels, strict=True):
        image[:, :, 4 * label : 4 * label + 4] += 1
    return TinyBase(lively(TinyNet(), seed=1), (images,), labels)


def lively(module: nn.Module, seed: int) -> nn.Module:
    """Random weights and batch statistics, so that no batch norm is near the identity. In eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator) * 0.3
            tensor.copy_(values.abs() + 0.5 if name.endswith(("running_var", "norm.weight")) else values)
    return module.eval()


def no_progress(done: float, total: float, note: str = "") -> None:
    """For tests that do not look at the progress."""


def context_of(base: Base, scratch: Path, progress: Progress = no_progress, seed: int = 0) -> BuildContext:
    """A build context with one thread, so that sums are added up in one order."""
    return BuildContext(base, seed, this_hardware(1), scratch, progress, CandidateEvaluator(base, 1))
