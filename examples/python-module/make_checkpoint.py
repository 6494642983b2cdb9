"""Make what the config names, so that the example runs anywhere: weights, images and class names, in half a minute.

The stand-in is small but real: scikit-learn's handwritten digits, enlarged to 32 x 32 pixels, in colours, and a
ResNet-20 trained on half of them for a few epochs. Replace the three files by those of your own model.

    python make_checkpoint.py [FOLDER] [--epochs N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from resnet20 import ResNet20
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch.nn import functional

CLASSES = tuple("0123456789")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""As in config.yaml."""
BATCH, LEARNING_RATE = 64, 0.01


def main(folder: Path, epochs: int) -> None:
    """Write resnet20.safetensors, images.npz and labels.txt into the folder."""
    torch.manual_seed(0)
    images, labels = colour_digits()
    seen, rest = np.split(np.random.default_rng(0).permutation(len(images)), [900])
    network = trained(images[seen], labels[seen], epochs)
    save_file(network.state_dict(), folder / "resnet20.safetensors")
    # Only images that the network has not seen: on the others every variant would look better than it is.
    np.savez_compressed(folder / "images.npz", images=images[rest], labels=labels[rest])
    (folder / "labels.txt").write_text("\n".join(CLASSES) + "\n")


def colour_digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 [1797, 32, 32, 3], each in two colours of its own, dark ink on a light ground; their classes."""
    ink, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(1)
    dark, light = random.integers(0, 96, (len(ink), 3)), random.integers(160, 256, (len(ink), 3))
    images = []
    for grey, low, high in zip(ink.reshape(-1, 8, 8) / 16, dark, light, strict=True):
        small = (high + grey[..., None] * (low - high)).astype(np.uint8)
        images.append(np.asarray(Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC)))
    return np.stack(images), labels.astype(np.int64)


def trained(images: NDArray[np.uint8], labels: NDArray[np.int64], epochs: int) -> ResNet20:
    """A network trained on these images, in eval mode."""
    network = ResNet20(len(CLASSES))
    inputs = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - column(MEAN)) / column(STD)
    targets = torch.from_numpy(labels)
    optimiser = torch.optim.AdamW(network.parameters(), LEARNING_RATE)
    steps = -(-len(inputs) // BATCH) * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
    for epoch in range(epochs):
        for rows in torch.randperm(len(inputs)).split(BATCH):
            loss = functional.cross_entropy(network(inputs[rows]), targets[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    return network.eval()


def column(values: tuple[float, ...]) -> torch.Tensor:
    """One value per channel, for images [N, C, H, W]."""
    return torch.tensor(values)[:, None, None]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the files that config.yaml names.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path())
    parser.add_argument("--epochs", type=int, default=6)
    main(**vars(parser.parse_args()))
