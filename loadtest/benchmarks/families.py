"""What the passes that make a model smaller do to a base: prints tables as those of docs/passes.md.

    python -m loadtest.benchmarks.families build digits cifar --folder FOLDER   # other work beside it does no harm
    python -m loadtest.benchmarks.families time digits cifar --folder FOLDER    # on a quiet machine
    python -m loadtest.benchmarks.families table digits cifar --folder FOLDER

Every pass is followed by `fold_bn` and `onnxruntime`; all ratios are to the base with these two alone (`onnx`). What
trains does so for two epochs on the train split, without labels. The base `cifar` is the ResNet-20 of
examples/python-module, brought along in FOLDER: `resnet20.py`, `resnet20.safetensors`, `labels.txt`, `images.npz`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from loadtest.benchmarks.ladders import ANCHOR, Bases, Steps, run

LOWER: Final[Steps] = ({"kind": "fold_bn"}, {"kind": "onnxruntime"})
HALF: Final[Mapping[str, Any]] = {"kind": "prune_layers", "drop": 2}
TAUGHT: Final[Mapping[str, Any]] = {"epochs": 2, "learning_rate": 0.0005}
"""Short and gentle."""


def variants(*, texts: bool) -> Mapping[str, Steps]:
    """What suits a base: convolutions have channels and kernels, texts have heads and linear layers."""
    lower = LOWER[1:] if texts else LOWER
    found = _prune(texts=texts) | _sparsity(texts=texts) | _lowrank(texts=texts) | _distill()
    return {"float": (), ANCHOR: lower, **{name: (*steps, *lower) for name, steps in found.items()}}


def _prune(*, texts: bool) -> dict[str, Steps]:
    found: dict[str, Steps] = {"layers-2": [HALF]}
    if not texts:
        half = {"kind": "prune_channels", "macs": 0.5}
        return {**found, "channels-half": [half], "channels-half-by-8": [{**half, "round_to": 8}]}
    return found | {f"{what}-quarter": [{"kind": "prune_heads", what: 0.25}] for what in ("heads", "feed_forward")}


def _lowrank(*, texts: bool) -> dict[str, Steps]:
    asked: dict[str, Any] = {"sensitivity": "answers"}
    if texts:
        linear = {"kind": "lowrank_linear", "macs": 0.7}
        found: dict[str, Steps] = {item: [{**linear, "method": item}] for item in ("svd", "asvd", "svd_llm")}
        return {**found, "svd_llm-answers": [{**linear, **asked}]}
    conv = {"kind": "lowrank_conv", "macs": 0.5}
    found = {item: [{**conv, "scheme": item}] for item in ("spatial", "channel", "tucker2", "cp", "depthwise")}
    return {**found, "spatial-answers": [{**conv, **asked}], "depthwise-answers": [{**found["depthwise"][0], **asked}]}


def _sparsity(*, texts: bool) -> dict[str, Steps]:
    block = {"block": [32, 384]} if texts else {}  # of queries and keys, a head
    moved = {"kind": "prune_movement", "sparsity": 0.5, **TAUGHT, **block}
    return {
        "magnitude-half": [{"kind": "prune_magnitude", "sparsity": 0.5}],
        "wanda-half": [{"kind": "prune_oneshot", "method": "wanda"}],
        "sparsegpt-half": [{"kind": "prune_oneshot"}],
        "sparsegpt-2-4": [{"kind": "prune_oneshot", "pattern": "2:4"}],
        "movement-half": [moved],
    }


def _distill() -> dict[str, Steps]:
    distilled = {"kind": "distill", **TAUGHT}
    return {
        "layers-2-distill": [HALF, distilled],
        "layers-2-features": [HALF, {"kind": "distill_features", **TAUGHT}],
        "layers-2-flat": [HALF, {"kind": "train_flat", **TAUGHT}],
        "student-distill": [{"kind": "student", "blocks": 0.5}, distilled],
    }


CIFAR: Final[Mapping[str, Any]] = {
    "base": {
        "python": "resnet20:resnet20",
        "weights": "resnet20.safetensors",
        "labels": "labels.txt",
        "image": {"size": [32, 32], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    },
    "data": {
        "arrays": "images.npz",
        "inputs": "images",
        "labels": "labels",
        "splits": {"calibration": 512, "gate": 1500, "test": 1500},
    },
}


BASES: Final[Bases] = {
    "digits": ({"base": "digits"}, variants(texts=False)),
    "cifar": (CIFAR, variants(texts=False)),
    "minilm": ({"base": "minilm"}, variants(texts=True)),
    "efficientnet_lite0": ({"base": "efficientnet_lite0"}, variants(texts=False)),
}


def main() -> None:
    """Build, time or print."""
    run(BASES, __doc__)


if __name__ == "__main__":
    main()
