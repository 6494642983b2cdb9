"""Options of every pass that make sense on a tiny network: for tests of what holds for all passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_files import lora_files

CASES: Mapping[str, tuple[Mapping[str, Any], float]] = {
    "student": ({"width": 0.66}, 0.3),
    "prune_channels": ({"ratio": 0.34}, 0.3),
    "prune_layers": ({"drop": 1}, 0.3),
    "prune_heads": ({"heads": 0.3, "feed_forward": 0.5}, 0.5),
    "lowrank_conv": ({"energy": 0.98}, 0.6),
    "lowrank_linear": ({"energy": 0.98}, 0.6),
    "prune_magnitude": ({"sparsity": 0.5}, 0.6),
    "prune_oneshot": ({"pattern": "2:4"}, 0.6),
    "prune_movement": ({"sparsity": 0.5, "epochs": 1, "precision": "float32"}, 0.3),
    "prune_at_init": ({"sparsity": 0.5, "init": "given"}, 0.3),
    "lottery_ticket": ({"sparsity": 0.5, "rounds": 1, "epochs": 1, "precision": "float32"}, -1.0),
    "distill": ({"epochs": 1, "precision": "float32"}, 0.7),
    "distill_features": ({"epochs": 1, "precision": "float32"}, 0.7),
    "distill_datafree": ({"epochs": 1, "precision": "float32", "rows": 32, "inversion_steps": 2}, 0.5),
    "distill_ensemble": ({"epochs": 1, "precision": "float32"}, 0.7),
    "train_flat": ({"epochs": 1, "precision": "float32"}, 0.7),
    "merge": ({}, 0.7),
    "rebasin": ({}, 0.7),
    "merge_lora": (lora_files(), 0.9),
    "fold_bn": ({}, 0.99999),
    "smooth": ({}, 0.99999),
    "cast": ({}, 0.999),
    "store_weights": ({"dtype": "fp8"}, 0.99),
    "fp8": ({}, 0.99),
    "sparse_2_4": ({}, 0.99),
    "quantize_static": ({}, 0.99),
    "qat": ({"epochs": 1, "precision": "float32"}, 0.98),
    "quantize_select": ({"max_drop": 0.5}, 0.99),
    "quantize_dynamic": ({}, 0.99),
    "quantize_weights": ({}, 0.97),
    "channels_last": ({}, 0.99999),
    "onnxruntime": ({}, 0.99999),
    "openvino": ({}, 0.99999),
    "torch_compile": ({"buckets": [4], "freezing": "off"}, 0.9999),
    "aot_inductor": ({"freezing": "off"}, 0.9999),
}
"""Options, and the least cosine of a tiny network's answers to the base's. Training and structure get a low bound: the
answers of a random network are noise, and nothing recovers what was cut."""

BEFORE: Mapping[str, list[Mapping[str, Any]]] = {"qat": [{"kind": "fold_bn"}]}
"""What a pass cannot do without before it."""
