"""What each precision and engine makes of a base: the table of docs/passes.md.

    python -m loadtest.benchmarks.precision build digits --folder FOLDER   # other work beside it does no harm
    python -m loadtest.benchmarks.precision time digits --folder FOLDER    # on a quiet machine
    python -m loadtest.benchmarks.precision table digits minilm --folder FOLDER

What is found out stands in FOLDER/results.jsonl, a line for each variant, as soon as it is known. Either command ends
after `--minutes`, and another call goes on where it ended. A variant that cannot be built is a line with the reason.
Times are those of rounds in which three variants take turns with onnxruntime in float32 (`ANCHOR`), to which all
ratios are.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml
from rich.console import Console

from leanserve.artifacts.benchmarks import BenchmarkResult, best_rate
from leanserve.artifacts.manifest import Recipe
from leanserve.build.builder import Builder
from leanserve.build.cache_key import RecipeStep
from leanserve.build.progress import BuildProgress
from leanserve.context import AppContext
from leanserve.errors import PassFailed
from leanserve.evaluation.interleaved_benchmark import GROUP
from leanserve.evaluation.quality import GateOutputs, measure
from leanserve.evaluation.speed import Stopwatch
from leanserve.hardware import this_hardware

Steps = Sequence[Mapping[str, Any]]
Line = dict[str, Any]

FOLD, SMOOTH, ORT = {"kind": "fold_bn"}, {"kind": "smooth"}, {"kind": "onnxruntime"}
UNFUSED = {"kind": "onnxruntime", "optimisation": "basic"}
OPENVINO, OPENVINO_BF16 = {"kind": "openvino"}, {"kind": "openvino", "precision": "bf16"}
BF16, FP16, AUTOCAST = ({"kind": "cast", **how} for how in ({}, {"dtype": "fp16"}, {"how": "autocast"}))
STORED_BF16, STORED_FP8 = ({"kind": "store_weights", "dtype": dtype} for dtype in ("bf16", "fp8"))
LAST, AOT = {"kind": "channels_last"}, {"kind": "aot_inductor"}
COMPILE = {"kind": "torch_compile", "freezing": "off"}
"""Compiled one way and not two: it is compiled whenever it is opened."""
TEXT = {"observer": "mse", "batch": 1, "embeddings": "int8"}
ANCHOR: Final = "onnx"


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
    "compiled": [COMPILE],
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
BASES: Final[Mapping[str, tuple[Mapping[str, Any], Mapping[str, Steps]]]] = {
    "digits": ({"base": "digits"}, images("mse", learned_too=True)),
    "minilm": ({"base": "minilm"}, TEXTS),
    "efficientnet_lite0": ({"base": "efficientnet_lite0"}, images("minmax")),
    "resnet50": (RANDOM, images("mse")),
}
"""Of each shipped base its sections of a config, and the variants."""


class Results:
    """The lines of `results.jsonl`: what is known of each variant, which later lines add to."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "results.jsonl"
        self._known: dict[tuple[str, str], Line] = {}
        for line in self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else ():
            self._learn(json.loads(line))

    def add(self, base: str, variant: str, found: Line) -> None:
        """Keep what was found out of a variant."""
        line = {"base": base, "variant": variant, **found}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._learn(line)

    def of(self, base: str) -> dict[str, Line]:
        """By variant, in the order of `BASES`."""
        return {name: self._known[base, name] for name in BASES[base][1] if (base, name) in self._known}

    def _learn(self, line: Line) -> None:
        self._known.setdefault((line["base"], line["variant"]), {}).update(line)


class Bench(NamedTuple):
    """A base with its variants, and the store that they are built in."""

    base: str
    context: AppContext
    results: Results
    end: float
    """By `time.monotonic`; nothing is begun afterwards."""

    def build(self) -> Iterator[str]:
        """Build and measure the variants that are not known yet, one by one; yields what became of each."""
        context = self.context
        builder = Builder(context.store, context.config, context.base, context.hardware, BuildProgress(Console(), 0))
        reference: GateOutputs | None = None
        for variant, steps in context.plan.recipes:
            if variant.name in self.results.of(self.base) and (reference or len(steps) > 1):
                continue
            if time.monotonic() >= self.end:
                yield f"{self.base}: {variant.name}: no time left; another call goes on with it"
                return
            try:
                recipes = [self._made(builder, step) for step in steps]
                reference, found = self._measured(recipes, reference)
            except PassFailed as error:
                found = {"reason": str(error)}
            self.results.add(self.base, variant.name, found)
            yield f"{self.base}: {variant.name}: {found}"

    def _made(self, builder: Builder, step: RecipeStep) -> Recipe:
        if step.key in self.context.plan.refused:
            raise PassFailed(self.context.plan.refused[step.key])
        return builder.make(step)

    def _measured(self, recipes: Sequence[Recipe], reference: GateOutputs | None) -> tuple[GateOutputs, Line]:
        """The base's answers, and what is found out of a variant in a fresh process."""
        context = self.context
        if reference is None:  # of an earlier call only what was measured is known
            ours, reference = measure(context.store, context.base, recipes[0], None, context.hardware)
        if len(recipes) > 1:
            ours, _ = measure(context.store, context.base, recipes[-1], reference, context.hardware)
        found = ours.fidelity
        return reference, {
            "key": recipes[-1].key,
            "answers": found.agreement,
            "worst": min(output.worst_agreement for output in found.outputs),
            "disk_bytes": found.disk_bytes,
            "memory_bytes": found.peak_memory_bytes,
            "seconds": sum(recipe.seconds for recipe in recipes[1:]),
        }

    def time(self, seconds: float) -> Iterator[str]:
        """Time the built variants that were not, a few at a time beside the anchor in so many seconds; yields each.

        Raises:
            SystemExit: the anchor is not built.
        """
        known, context = self.results.of(self.base), self.context
        if "key" not in known.get(ANCHOR, {}):
            raise SystemExit(f"{self.base}: build '{ANCHOR}' first, beside which all are timed")
        stopwatch = Stopwatch(context.store, context.base, context.hardware, seconds)
        waiting = (name for name, line in known.items() if "key" in line and "ms" not in line)
        while time.monotonic() < self.end and (group := list(islice(waiting, GROUP))):
            keys = {known[name]["key"]: name for name in group}
            for result in stopwatch.beside_anchor(known[ANCHOR]["key"], list(keys)):
                self.results.add(self.base, keys[result.key], _speed(result))
                yield f"{self.base}: {keys[result.key]}: {_speed(result)}"


def bench(base: str, folder: Path, end: float) -> Bench:
    """That of a base of `BASES`."""
    sections, variants = BASES[base]
    document = {
        **sections,
        "gate": {"on_fail": "exclude"},
        "variants": [{"name": name, "passes": [dict(step) for step in steps]} for name, steps in variants.items()],
    }
    results, path = Results(folder), folder / f"{base}.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return Bench(base, AppContext(path, folder / "store"), results, end)


def _speed(result: BenchmarkResult) -> Line:
    """Milliseconds and rows/s as timed, and how many times as fast as the anchor: at one row, and at the best batch."""
    return {
        "ms": result.latency_ms,
        "rows_per_s": result.throughput,
        "by_anchor": [1 / result.ratios[1].median, result.throughput / best_rate(result.anchor_ms)],
        "rounds": result.rounds,
        "waited": result.waited,
    }


def table(found: Mapping[str, Line]) -> Iterator[str]:
    """The variants of a base in Markdown."""
    yield f"| variant | answers | size MB | p50 ms (1 row) | rows/s | by `{ANCHOR}` | memory MB | built in s |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, line in found.items():
        if "reason" in line:
            yield f"| {name} | {line['reason']} |"
            continue
        ms, rate, by_anchor = "", "", ""
        if "ms" in line:
            ms = f"{next(iter(line['ms'].values())):.2f}"
            rate = f"{line['rows_per_s']:,.0f}"
            by_anchor = " / ".join(f"{ratio:.2f}x" for ratio in line["by_anchor"])
        yield (
            f"| {name} | {line['answers']:.4f} | {line['disk_bytes'] / 1e6:.1f} | {ms} | {rate} | {by_anchor} "
            f"| {line['memory_bytes'] / 1e6:.0f} | {line['seconds']:.0f} |"
        )


def main() -> None:
    """Build, time or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("build", "time", "table"))
    parser.add_argument("bases", nargs="+", choices=BASES)
    parser.add_argument("--folder", type=Path, required=True, help="artifacts and results, which may stay")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which nothing more is begun")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing for each three variants")
    options = parser.parse_args()
    out, end = Console(width=200, highlight=False, soft_wrap=True), time.monotonic() + 60 * options.minutes
    if options.command == "table":
        out.print(this_hardware().words)
    for base in options.bases:
        if options.command == "table":
            out.print(f"\n{base}\n")
            lines = table(Results(options.folder).of(base))
        else:
            chosen = bench(base, options.folder, end)
            lines = chosen.build() if options.command == "build" else chosen.time(options.seconds)
        for line in lines:
            out.print(line, markup=False)


if __name__ == "__main__":
    main()
