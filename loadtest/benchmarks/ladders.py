"""Many variants of a few bases, built, timed and told one by one: what `precision` and `families` have in common.

What is found out stands in FOLDER/results.jsonl, a line for each variant, as soon as it is known. Either command ends
after `--minutes`, and another call goes on where it ended. A variant that cannot be built is a line with the reason.
Times are those of rounds in which three variants take turns with onnxruntime in float32 (`ANCHOR`), to which all
ratios are.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

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

Steps: TypeAlias = Sequence[Mapping[str, Any]]
Line: TypeAlias = dict[str, Any]
Bases: TypeAlias = Mapping[str, tuple[Mapping[str, Any], Mapping[str, Steps]]]
"""Of each base its sections of a config, and the variants."""
ANCHOR: Final = "onnx"


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

    def of(self, base: str, order: Iterable[str] = ()) -> dict[str, Line]:
        """By variant: those that `order` names in this order, and all others as they were found."""
        found = {variant: line for (whose, variant), line in self._known.items() if whose == base}
        return {name: found[name] for name in dict.fromkeys([*order, *found]) if name in found}

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
            "score": found.score,
            "macs": [recipe.macs for recipe in recipes if recipe.format == "torch"][-1],
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


def bench(base: str, bases: Bases, folder: Path, end: float) -> Bench:
    """That of one of the bases."""
    sections, variants = bases[base]
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
    columns = ["variant", "answers", "score", "MACs M", "size MB", "p50 ms (1 row)", "rows/s", f"by `{ANCHOR}`"]
    columns += ["memory MB", "built in s"]
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for name, line in found.items():
        if "reason" in line:
            yield f"| {name} | {line['reason']} |"
            continue
        ms, rate, by_anchor = "", "", ""
        score = "" if line.get("score") is None else f"{line['score']:.4f}"
        macs = f"{line['macs'] / 1e6:.0f}" if "macs" in line else ""  # older lines do not have them
        if "ms" in line:
            ms = f"{next(iter(line['ms'].values())):.2f}"
            rate = f"{line['rows_per_s']:,.0f}"
            by_anchor = " / ".join(f"{ratio:.2f}x" for ratio in line["by_anchor"])
        size, memory = f"{line['disk_bytes'] / 1e6:.1f}", f"{line['memory_bytes'] / 1e6:.0f}"
        cells = [
            name,
            f"{line['answers']:.4f}",
            score,
            macs,
            size,
            ms,
            rate,
            by_anchor,
            memory,
            f"{line['seconds']:.0f}",
        ]
        yield f"| {' | '.join(cells)} |"


def run(bases: Bases, description: str | None) -> None:
    """The command line of a benchmark of these bases: build, time or print."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("build", "time", "table"))
    parser.add_argument("bases", nargs="+", choices=bases)
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
            lines = table(Results(options.folder).of(base, bases[base][1]))
        else:
            chosen = bench(base, bases, options.folder, end)
            lines = chosen.build() if options.command == "build" else chosen.time(options.seconds)
        for line in lines:
            out.print(line, markup=False)
