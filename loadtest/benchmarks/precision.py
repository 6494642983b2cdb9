"""What each precision and engine makes of a base: the tables of docs/passes.md, measured by `leanserve build`.

    python -m loadtest.benchmarks.precision digits minilm --cache FOLDER

Variants that this machine cannot build are left out, with the reason. Ratios are those of the build: interleaved rounds
beside the base, with the interval that the rounds leave. What is in the cache is not measured again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from rich.console import Console

from leanserve.artifacts.manifest import VariantReport
from leanserve.context import AppContext
from leanserve.hardware import this_hardware

Steps = Sequence[Mapping[str, Any]]

FOLD, ORT = {"kind": "fold_bn"}, {"kind": "onnxruntime"}
SMOOTH = {"kind": "smooth"}
TEXT_INT8 = {"kind": "quantize_static", "observer": "mse", "batch": 1, "embeddings": "int8"}
OPENVINO, OPENVINO_BF16 = {"kind": "openvino"}, {"kind": "openvino", "precision": "bf16"}
BF16, AOT, LAST = {"kind": "cast"}, {"kind": "aot_inductor"}, {"kind": "channels_last"}


def images(observer: str) -> dict[str, Steps]:
    """Of convolutional networks."""
    int8 = {"kind": "quantize_static", "observer": observer}
    return {
        "float": [],
        "channels-last": [FOLD, LAST],
        "bf16": [FOLD, BF16, LAST],
        "aot": [FOLD, AOT],
        "aot-bf16": [FOLD, BF16, AOT],
        "onnx": [FOLD, ORT],
        "onnx-fp8-stored": [FOLD, {"kind": "store_weights", "dtype": "fp8"}, ORT],
        "onnx-int8": [FOLD, int8, ORT],
        "openvino": [FOLD, OPENVINO],
        "openvino-bf16": [FOLD, OPENVINO_BF16],
        "openvino-int8": [FOLD, int8, OPENVINO],
    }


TEXTS: Final[dict[str, Steps]] = {
    "float": [],
    "bf16": [BF16],
    "aot": [AOT],
    "aot-bf16": [BF16, AOT],
    "onnx": [ORT],
    "onnx-fp8-stored": [{"kind": "store_weights", "dtype": "fp8"}, ORT],
    "onnx-4-bits": [{"kind": "quantize_weights", "bits": 4}, ORT],
    "onnx-int8-dynamic": [{"kind": "quantize_dynamic"}, ORT],
    "onnx-int8": [SMOOTH, TEXT_INT8, ORT],
    "openvino": [OPENVINO],
    "openvino-bf16": [OPENVINO_BF16],
    "openvino-int8": [SMOOTH, TEXT_INT8, OPENVINO],
}
BASES: Final[Mapping[str, tuple[Mapping[str, Any], Mapping[str, Steps]]]] = {
    "digits": ({"base": "digits"}, images("mse")),
    "minilm": ({"base": "minilm"}, TEXTS),
    "efficientnet_lite0": ({"base": "efficientnet_lite0"}, images("minmax")),
    "resnet50": ({"base": {"shipped": "resnet50", "weights": "random"}, "data": {"synthetic": 64}}, images("mse")),
}
"""Of each shipped base its sections of a config, and the variants."""


def built(name: str, cache: Path, seconds: float) -> list[VariantReport]:
    """The variants of a base, built and measured."""
    sections, variants = BASES[name]
    document = {
        **sections,
        "gate": {"on_fail": "exclude"},
        "variants": [
            {"name": variant, "passes": [dict(step) for step in steps]} for variant, steps in variants.items()
        ],
    }
    path = cache / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "leanserve", "build", "--config", str(path), "--cache", str(cache)]
    subprocess.run([*command, "--measure-seconds", str(seconds)], check=True, env=os.environ)
    return AppContext(path, cache).reports()


def lines(reports: Sequence[VariantReport]) -> Iterator[str]:
    """A table in Markdown: ratios by the throughput of `float` in torch."""
    yield "| variant | answers | size MB | p50 ms (1 row) | rows/s | by float | memory MB | built in s |"
    yield "|---|---|---|---|---|---|---|---|"
    for report in reports:
        if not report.built:
            yield f"| {report.name} | {report.reason} |"
        else:
            found, seconds = report.quality, sum(item.seconds for item in report.ancestry[1:])
            yield (
                f"| {report.name} | {100 * found.agreement:.1f} % | {found.disk_bytes / 1e6:.1f} "
                f"| {found.latency_ms[1]:.1f} | {found.throughput:.0f} "
                f"| {found.speedup:.2f}x ({found.speedup_low:.2f}-{found.speedup_high:.2f}) "
                f"| {found.peak_memory_bytes / 1e6:.0f} | {seconds:.0f} |"
            )


def main() -> None:
    """Build, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bases", nargs="*", default=list(BASES), help=f"of {', '.join(BASES)}")
    parser.add_argument("--cache", type=Path, required=True, help="artifact store, where all this may stay")
    parser.add_argument("--measure-seconds", type=float, default=120.0)
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    out = Console(width=200, highlight=False)
    out.print(f"{this_hardware().words}")
    for name in options.bases:
        out.print(f"\n{name}\n")
        for line in lines(built(name, options.cache, options.measure_seconds)):
            out.print(line)


if __name__ == "__main__":
    main()
