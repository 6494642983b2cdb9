"""Make what the config names, so that the example runs anywhere: a fine-tuned timm model and folders of images.

The stand-in is small but real: handwritten digits of scikit-learn as PNG files, one folder per class, and the smallest
residual network of timm, fine-tuned on those of the folder `train`. Replace both by your own.

    python make_checkpoint.py [FOLDER] [--epochs N]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch.nn import functional

from leanserve.bases.sources.python_imports import make_torchvision_importable

NAME = "test_resnet.r160_in1k"
"""As in config.yaml."""
SIZE, CLASSES = 64, 10
MEAN, STD = 0.5, 0.5
BATCH, LEARNING_RATE = 64, 0.003
SPLITS = {"train": 900, "calibration": 200, "gate": 400}


def main(folder: Path, epochs: int) -> None:
    """Write model.safetensors and photos/SPLIT/CLASS/*.png into the folder."""
    torch.manual_seed(0)
    ink, labels = load_digits(return_X_y=True)
    images = [Image.fromarray((255 - grey * 15.9).astype(np.uint8)).convert("RGB") for grey in ink.reshape(-1, 8, 8)]
    images = [image.resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in images]
    rows = np.split(np.random.default_rng(0).permutation(len(ink)), np.cumsum(list(SPLITS.values())))
    for split, chosen in zip(SPLITS, rows, strict=False):
        for row in chosen:
            path = folder / "photos" / split / str(labels[row]) / f"{row:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            images[row].save(path)
    stacked = np.stack([np.asarray(images[row]) for row in rows[0]])
    network = trained(torch.from_numpy(stacked), torch.from_numpy(labels[rows[0]]), epochs)
    save_file(network.state_dict(), folder / "model.safetensors")


def trained(images: torch.Tensor, labels: torch.Tensor, epochs: int) -> Any:
    """timm's network, fine-tuned on images uint8 [N, H, W, 3]."""
    make_torchvision_importable()
    import timm

    network = timm.create_model(NAME, pretrained=False, num_classes=CLASSES)
    inputs = (images.permute(0, 3, 1, 2) / 255 - MEAN) / STD
    optimiser = torch.optim.AdamW(network.parameters(), LEARNING_RATE)
    steps = -(-len(inputs) // BATCH) * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
    for epoch in range(epochs):
        network.train()
        for rows in torch.randperm(len(inputs)).split(BATCH):
            loss = functional.cross_entropy(network(inputs[rows]), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}")
    return network.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent)
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    main(arguments.folder, arguments.epochs)
