"""One remedy for one trap: torchvision next to a torch of another build.

Many libraries import torchvision. Its wheel on the package index is built for CUDA; beside a torch for CPUs, its
compiled part cannot be loaded, and importing the rest fails with `operator torchvision::nms does not exist`, because it
registers shapes for operators that nobody has declared. Declaring them is enough: the operators belong to object
detection, and no model that is served here calls them.
"""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

DECLARED = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def make_torchvision_importable() -> None:
    """Declare the operators that torchvision's compiled part should bring, if it is installed and cannot.

    It is not imported: call this before libraries and modules of users, which may import it or not.
    """
    import torch

    found = find_spec("torchvision")
    if found is None or found.origin is None or hasattr(torch.ops.torchvision, DECLARED[0]):
        return
    compiled = (Path(found.origin).with_name(f"_C{suffix}") for suffix in EXTENSION_SUFFIXES)
    try:
        torch.ops.load_library(next(path for path in compiled if path.is_file()))  # type: ignore[no-untyped-call]
    except (OSError, StopIteration):
        for operator in DECLARED:
            torch.library.define(f"torchvision::{operator}", SCHEMA)
