"""The base `digits`: real handwritten digits and a residual CNN that reads them, small enough for any laptop.

Data: scikit-learn's bundled set (UCI "Optical Recognition of Handwritten Digits", 1,797 grey images of 8x8, values
0..16), so nothing is downloaded. An image is the image scaled to 0..255; the model sees it resized to 32x32 by Pillow.
The four splits share no image, but they do share writers: the 13 people behind the set are not told apart in it, so the
scores are those of known writers and would be lower for strangers.

Model: `ResidualNet`, 3 stages of 3 blocks, widths 32/64/128; 1,084,010 parameters and 162 million multiply-accumulates
per image. `python -m leanserve_models.train_digits` trains the weights beside this file, on the split `train` alone.
Those committed (40 epochs, seed 0) reach 99.33 % on the gate and 99.67 % on the test split, of 300 images each.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from leanserve_models.residual import ResidualNet

INPUTS = ({"name": "image", "dtype": "float32", "shape": (1, 32, 32)},)
OUTPUTS = ({"name": "logits", "dtype": "float32", "shape": (10,), "meaning": "logits"},)
LABELS = tuple("0123456789")
SIZE = (32, 32)
MEAN, STD = 0.3047, 0.3233
"""Of the resized images of the split `train`, scaled to 0..1."""
IMAGE = {"mode": "L", "size": SIZE, "resize": "bilinear", "mean": (MEAN,), "std": (STD,)}
FILES = ("residual.py", "weights/digits.safetensors")
LIBRARIES = ("numpy", "pillow", "scikit-learn", "torch")

WEIGHTS = Path(__file__).parent / "weights" / "digits.safetensors"
SPLIT_SEED = 20
SPLIT_ROWS = {"calibration": 200, "gate": 300, "test": 300, "train": 997}

Split = Literal["train", "calibration", "gate", "test"]
Array = NDArray[Any]


def architecture() -> ResidualNet:
    """The untrained network."""
    from leanserve_models.residual import ResidualNet

    return ResidualNet(channels=1, classes=len(LABELS), widths=(32, 64, 128), blocks=3)


def build() -> ResidualNet:
    """The trained network in eval mode, float32, on the CPU: image [N, 1, 32, 32] -> logits [N, 10]."""
    from safetensors.torch import load_file

    network = architecture()
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval()


def data(split: Split, n: int | None = None) -> tuple[tuple[Array], Array]:
    """At most the first `n` rows of a split: (float32 [rows, 1, 32, 32],) and int64 [rows].

    Every prefix of a split is stratified: its classes are as frequent as in the whole set, to within one or two images.
    """
    drawn, labels = images(split, n)
    return (np.stack([_prepare(Image.fromarray(image)) for image in drawn]),), labels


def score(outputs: tuple[Array, ...], labels: Array) -> float:
    """Top-1 accuracy of the logits, 0..1."""
    return float((outputs[0].argmax(axis=1) == labels).mean())


def images(split: Split, n: int | None = None) -> tuple[Array, Array]:
    """The rows of `data` as a client would send them: uint8 [rows, 8, 8], white ink on black, and their labels."""
    images, labels = _images()
    rows = _split_rows()[split][:n]
    return images[rows], labels[rows]


def _prepare(image: Image.Image) -> Array:
    """Grey image of any size -> float32 [1, 32, 32], as `IMAGE` declares it."""
    small = image.resize(SIZE, Image.Resampling.BILINEAR)
    scaled = np.asarray(small, dtype=np.float32)[None] / np.float32(255)
    return np.asarray((scaled - np.float32(MEAN)) / np.float32(STD))


@cache
def _images() -> tuple[Array, Array]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), labels.astype(np.int64)


@cache
def _split_rows() -> dict[str, Array]:
    """Cut one stratified order into the splits: each class is shuffled, then spread evenly over the whole order."""
    labels = _images()[1]
    random = np.random.default_rng(SPLIT_SEED)
    place = np.empty(len(labels))
    for label in range(len(LABELS)):
        members = random.permutation(np.flatnonzero(labels == label))
        place[members] = (np.arange(len(members)) + random.random()) / len(members)
    cuts = np.cumsum(list(SPLIT_ROWS.values()))[:-1]
    return dict(zip(SPLIT_ROWS, np.split(np.argsort(place, kind="stable"), cuts), strict=True))
