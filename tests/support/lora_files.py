"""An adapter as PEFT writes it, for the layers `head` (linear) and `conv1` (a convolution) of two small networks."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def lora_tensors(width: int = 48, rank: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "head.lora_A": (rank, 2 * width),
        "head.lora_B": (10, rank),
        "conv1.lora_A": (rank, width, 3, 3),
        "conv1.lora_B": (width, rank, 1, 1),
    }
    draw = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {f"base_model.model.{name}.weight": tensor for name, tensor in draw.items()}


def write_lora(folder: Path, tensors: dict[str, Tensor], **settings: Any) -> dict[str, Any]:
    """The options of `merge_lora` for such an adapter."""
    save_file(tensors, folder / "adapter_model.safetensors")
    told = {"lora_alpha": 8, "r": 2, "bias": "none", "use_dora": False, "fan_in_fan_out": False, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return {
        "adapter": str(folder / "adapter_model.safetensors"),
        "settings": str(folder / "adapter_config.json"),
    }


@cache
def lora_files(width: int = 48) -> dict[str, Any]:
    return write_lora(Path(tempfile.mkdtemp()), lora_tensors(width))
