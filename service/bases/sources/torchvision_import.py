"""One remedy for one trap: torchvision next to a torch of another build.

timm and transformers import torchvision. Its wheel on the package index is built for CUDA; beside a torch for CPUs, its
compiled part cannot be loaded, and importing the rest fails with `operator torchvision::nms does not exist`, because it
registers shapes for operators that nobody has declared. Declaring them is enough: the operators belong to object
detection, and no model that is served here calls them.
"""

from __future__ import annotations

from importlib import import_module

DECLARED = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def make_torchvision_importable() -> None:
    """Import torchvision if it is installed; declare the operators that its compiled part should have brought."""
    import torch

    try:
        import_module("torchvision")
    except ModuleNotFoundError:
        return  # who imports it next will say so
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for operator in DECLARED:
            torch.library.define(f"torchvision::{operator}", SCHEMA)
        import_module("torchvision")
