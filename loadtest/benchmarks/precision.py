"""What each precision and engine makes of a base: the table of docs/passes.md.

    python -m loadtest.benchmarks.precision build digits --folder FOLDER   # other work beside it does no harm
    python -m loadtest.benchmarks.precision time digits --folder FOLDER    # on a quiet machine
    python -m loadtest.benchmarks.precision table digits minilm --folder FOLDER

All ratios are to `onnx`, onnxruntime in float32; `ladders` tells the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from loadtest.benchmarks.ladders import Bases, Steps, run

FOLD, SMOOTH, ORT = {"kind": "fold_bn"}, {"kind": "smooth"}, {"kind": "onnxruntime"}
UNFUSED = {"kind": "onnxruntime", "optimisation": "basic"}
OPENVINO, OPENVINO_BF16 = {"kind": "openvino"}, {"kind": "openvino", "precision": "bf16"}
BF16, FP16, AUTOCAST = ({"kind": "cast", **how} for how in ({}, {"dtype": "fp16"}, {"how": "autocast"}))
STORED_BF16, STORED_FP8 = ({"kind": "store_weights", "dtype": dtype} for dtype in ("bf16", "fp8"))
LAST, AOT = {"kind": "channels_last"}, {"kind": "aot_inductor"}
COMPILE = {"kind": "torch_compile", "freezing": "off"}
"""Compiled one way and not two: it is compiled whenever it is opened."""
TEXT = {"observer": "mse", "batch": 1, "embeddings": "int8"}


def weights(bits: int) -> Mapping[str, Any]:
    """Weights of linear layers and tables in so few bits."""
    return {"kind": "quantize_weights", "bits": bits}


def images(observer: str, *, learned_too: bool = False) -> dict[str, Steps]:
    """Of convolutional networks; what is learned takes minutes, and rows that are like those that are asked."""
    int8 = {"kind": "quantize_static", "observer": observer}
    select = {"kind": "quantize_select", "observer": observer, "max_drop": 0.02}
    learned: dict[str, Steps] = {"onnx-int8-qat": [FOLD, {"kind": "qat", "quantize": {"observer": observer}}, ORT]}
    return {
        "float": [],
        "channels-last": [FOLD, LAST],
        "bf16": [FOLD, BF16, LAST],
        "bf16-autocast": [FOLD, AUTOCAST, LAST],
        "fp16": [FOLD, FP16, LAST],
        "compiled": [FOLD, COMPILE],
        "aot": [FOLD, AOT],
        "aot-bf16": [FOLD, BF16, AOT],
        "onnx": [FOLD, ORT],
        "onnx-unfused": [FOLD, UNFUSED],
        "onnx-bf16-stored": [FOLD, STORED_BF16, ORT],
        "onnx-fp8-stored": [FOLD, STORED_FP8, ORT],
        "onnx-4-bits": [FOLD, weights(4), ORT],
        "onnx-int8-dynamic": [FOLD, {"kind": "quantize_dynamic"}, ORT],
        "onnx-int8": [FOLD, int8, ORT],
        "onnx-int8-select": [FOLD, select, ORT],
        "openvino": [FOLD, OPENVINO],
        "openvino-bf16": [FOLD, OPENVINO_BF16],
        "openvino-int8": [FOLD, int8, OPENVINO],
        "openvino-int8-bf16": [FOLD, int8, OPENVINO_BF16],
        **(learned if learned_too else {}),
    }


TEXTS: Final[dict[str, Steps]] = {
    "float": [],
    "bf16": [BF16],
    "bf16-autocast": [AUTOCAST],
    "fp16": [FP16],
    "compiled": [{**COMPILE, "buckets": []}],
    "aot": [AOT],
    "aot-bf16": [BF16, AOT],
    "onnx": [ORT],
    "onnx-unfused": [UNFUSED],
    "onnx-bf16-stored": [STORED_BF16, ORT],
    "onnx-fp8-stored": [STORED_FP8, ORT],
    **{f"onnx-{bits}-bits": [weights(bits), ORT] for bits in (8, 4, 3, 2)},
    "onnx-int8-dynamic": [{"kind": "quantize_dynamic"}, ORT],
    "onnx-int8-unsmoothed": [{"kind": "quantize_static", **TEXT}, ORT],
    "onnx-int8": [SMOOTH, {"kind": "quantize_static", **TEXT}, ORT],
    "openvino": [OPENVINO],
    "openvino-bf16": [OPENVINO_BF16],
    "openvino-int8": [SMOOTH, {"kind": "quantize_static", **TEXT}, OPENVINO],
    "openvino-int8-bf16": [SMOOTH, {"kind": "quantize_static", **TEXT}, OPENVINO_BF16],
    "onnx-int8-select": [{"kind": "quantize_select", **TEXT, "max_drop": 0.005, "probe": 32}, ORT],
}
RANDOM = {"base": {"shipped": "resnet50", "weights": "random"}, "data": {"synthetic": 64}}
BASES: Final[Bases] = {
    "digits": ({"base": "digits"}, images("mse", learned_too=True)),
    "minilm": ({"base": "minilm"}, TEXTS),
    "efficientnet_lite0": ({"base": "efficientnet_lite0"}, images("minmax")),
    "resnet50": (RANDOM, images("mse")),
}


def main() -> None:
    """Build, time or print."""
    run(BASES, __doc__)


if __name__ == "__main__":
    main()
