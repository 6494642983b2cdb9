"""Building variants: a plain `for` over passes with a look into the prefix cache before each.

The whole config is planned first (`plan`), so that a second start knows without importing torch that nothing is to be
done. Building itself runs in a child process of the server (`leanserve build`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from leanserve.artifacts.benchmarks import BenchmarkResult, BenchmarkSet, LaneRates
from leanserve.artifacts.load import OneByOne, load_model
from leanserve.artifacts.manifest import Failure, Manifest, Measurement, Recipe, VariantReport
from leanserve.artifacts.store import ArtifactStore, checksums
from leanserve.build.cache_key import RecipeStep, steps_of, versions_of
from leanserve.build.progress import BuildProgress
from leanserve.config.schema import ServiceConfig, VariantConfig
from leanserve.contracts import Base, BuildContext, Format, Model, ModelSize
from leanserve.errors import ArtifactCorrupt, GateFailed, PassFailed, StartupError
from leanserve.evaluation.candidates import CandidateEvaluator
from leanserve.evaluation.quality import GateOutputs, benchmark, benchmark_lanes, gate_reason, measure
from leanserve.hardware import Hardware
from leanserve.memory import is_out_of_memory
from leanserve.passes.base import Applied, Pass, Stage
from leanserve.runtime.formats import format_named

_Measured = TypeVar("_Measured", Measurement, BenchmarkResult, LaneRates)


@dataclass(frozen=True)
class Plan:
    """Every variant with the steps that make it, in building order."""

    recipes: tuple[tuple[VariantConfig, tuple[RecipeStep, ...]], ...]

    @property
    def steps(self) -> tuple[RecipeStep, ...]:
        """Every artifact of the plan once, in building order."""
        found: dict[str, RecipeStep] = {}
        for _, steps in self.recipes:
            for step in steps:
                found.setdefault(step.key, step)
        return tuple(found.values())

    @property
    def keys(self) -> tuple[str, ...]:
        """Those of `steps`."""
        return tuple(step.key for step in self.steps)

    @property
    def anchor(self) -> str:
        """The base, beside which all others are timed."""
        return self.steps[0].key

    @property
    def served(self) -> tuple[str, ...]:
        """The last artifact of every variant, once."""
        return tuple(dict.fromkeys(steps[-1].key for _, steps in self.recipes))


def plan(config: ServiceConfig, base: Base, hardware: Hardware) -> Plan:
    """The recipes of all variants.

    Raises:
        PassFailed: a pass cannot pay on this machine.
    """
    for variant in config.variants:
        for position, pass_ in enumerate(variant.passes, start=1):
            if reason := pass_.unsupported_reason(hardware):
                raise PassFailed(f"{_where(variant.name, pass_, position)}: {reason}")
    return Plan(tuple((variant, steps_of(config, base, variant, hardware)) for variant in config.variants))


def living(store: ArtifactStore, work: Plan) -> Plan:
    """The plan with the base alone in the place of every variant that cannot be made."""
    recipes = ((variant, steps[:1] if failed_step(store, steps) else steps) for variant, steps in work.recipes)
    return Plan(tuple(recipes))


def failed_step(store: ArtifactStore, steps: Sequence[RecipeStep]) -> tuple[RecipeStep, str] | None:
    """The first step that was tried and could not be made, and why."""
    found = ((step, store.failure(step.key)) for step in steps)
    return next(((step, failure.reason) for step, failure in found if failure is not None), None)


def stored_benchmark(store: ArtifactStore, work: Plan, hardware: Hardware) -> BenchmarkSet | None:
    """How fast all artifacts are on this machine, with lanes too if there are threads for several; `None`: not known.

    Where that is missing from a cache that cannot be written: how fast they are on another machine, if possible with as
    many threads.

    Raises:
        ArtifactCorrupt: what was timed on this machine is damaged.
    """
    work = living(store, work)
    here = _benchmark_on(store, work, _machine(hardware))
    if here.covers(work.keys, work.served):
        return here
    machines = [] if store.writable else store.machines(work.anchor)
    found = [_intact_benchmark(store, work, machine) for machine in machines]
    complete = [other for other in found if other is not None and other.covers(work.keys, work.served)]
    return min(complete, key=lambda other: (other.threads != hardware.threads, other.cpu), default=None)


def _benchmark_on(store: ArtifactStore, work: Plan, machine: tuple[str, int]) -> BenchmarkSet:
    """What is known of a machine: its processor, and threads."""
    cpu, threads = machine
    results = {key: store.benchmark(key, work.anchor, cpu, threads) for key in work.keys}
    lanes = {key: store.lane_rates(key, cpu, threads) for key in (work.served if threads > 1 else ())}
    return BenchmarkSet(cpu, threads, work.anchor, _present(results), _present(lanes))


def _intact_benchmark(store: ArtifactStore, work: Plan, machine: tuple[str, int]) -> BenchmarkSet | None:
    with suppress(ArtifactCorrupt):
        return _benchmark_on(store, work, machine)
    return None


def _machine(hardware: Hardware) -> tuple[str, int]:
    """What tells machines apart whose measurements are not compared."""
    return hardware.cpu, hardware.threads


def _present(found: Mapping[str, _Measured | None]) -> dict[str, _Measured]:
    return {key: item for key, item in found.items() if item is not None}


def shortfall(store: ArtifactStore, work: Plan, hardware: Hardware) -> str | None:
    """What has to be built or measured before anything can be served, in words; `None`: nothing."""
    try:
        alive = living(store, work)
        timed = stored_benchmark(store, work, hardware) or _benchmark_on(store, alive, _machine(hardware))
        for step in alive.steps:
            if store.manifest(step.key, timed) is None:
                missing = "not built" if store.recipe(step.key) is None else "not measured on this machine"
                return f"{step.variant}: {_kind(step)} is {missing}"
        if not timed.covers(alive.keys, alive.served):
            return "the gain of several lanes is not measured on this machine"
    except ArtifactCorrupt as error:
        return str(error)
    return None


def machines(store: ArtifactStore, work: Plan, hardware: Hardware) -> list[str]:
    """Where the reported numbers were measured, if not here: a processor and its threads each."""
    timed = stored_benchmark(store, work, hardware)
    measured = [timed, *(store.measurement(key) for key in living(store, work).keys)]
    found = {(item.cpu, item.threads) for item in measured if item is not None} - {_machine(hardware)}
    return [f"{cpu} with {count} thread{'s' if count > 1 else ''}" for cpu, count in sorted(found)]


def reports(store: ArtifactStore, config: ServiceConfig, work: Plan, hardware: Hardware) -> list[VariantReport]:
    """Every variant with its manifests and the gate's word.

    Raises:
        GateFailed: a variant fails a gate that says `on_fail: abort`, or cannot be made and has such a gate.
        ArtifactCorrupt: an artifact is missing or damaged.
    """
    timed = stored_benchmark(store, work, hardware)
    alive = living(store, work)
    manifests = {key: store.manifest(key, timed) for key in alive.keys} if timed else {}
    found = []
    for (variant, steps), (_, every) in zip(alive.recipes, work.recipes, strict=True):
        ancestry = tuple(manifest for step in steps if (manifest := manifests.get(step.key)))
        if len(ancestry) != len(steps):
            raise ArtifactCorrupt(f"variant '{variant.name}' is not built; run `leanserve build`")
        failed = failed_step(store, every)
        found.append(
            _report(config, variant, ancestry) if failed is None else _unmade(config, variant, ancestry, failed)
        )
    return found


def _report(config: ServiceConfig, variant: VariantConfig, ancestry: tuple[Manifest, ...]) -> VariantReport:
    gate = config.gate_of(variant)
    reason = gate_reason(gate, ancestry[-1].quality, ancestry[0].quality)
    if reason and gate.on_fail == "abort":
        remedy = "Soften its passes, allow more, or set on_fail: exclude."
        raise GateFailed(f"variant '{variant.name}' fails its gate: {reason}. {remedy}")
    return VariantReport(
        name=variant.name,
        state="excluded" if reason else "serving",
        reason=reason,
        parents=variant.parent_names,
        ancestry=ancestry,
    )


def _unmade(
    config: ServiceConfig, variant: VariantConfig, ancestry: tuple[Manifest, ...], failed: tuple[RecipeStep, str]
) -> VariantReport:
    """The report of a variant of which a pass could not be applied."""
    step, reason = failed
    whose = "" if step.variant == variant.name else f" of its parent '{step.variant}'"
    reason = f"pass {step.position} ({_kind(step)}){whose} cannot be applied: {reason}"
    if config.gate_of(variant).wants_abort:
        raise GateFailed(f"variant '{variant.name}': {reason}. Drop the pass, or set gate.on_fail: exclude.")
    return VariantReport(
        name=variant.name,
        state="excluded",
        reason=reason,
        parents=variant.parent_names,
        ancestry=ancestry,
        built=False,
    )


class Builder:
    """Makes the missing artifacts of a plan, one by one."""

    def __init__(
        self, store: ArtifactStore, config: ServiceConfig, base: Base, hardware: Hardware, progress: BuildProgress
    ) -> None:
        self._store = store
        self._config = config
        self._base = base
        self._hardware = hardware
        self._progress = progress
        self._evaluator = CandidateEvaluator(base, hardware.threads)
        self._reference: GateOutputs | None = None
        self._made: tuple[str, Model] | None = None
        """Key and model of the artifact that was made last."""

    def build(self, work: Plan) -> None:
        """Build all variants; what exists is verified and used, what is damaged is rebuilt with a message.

        A variant of which a pass cannot be applied is noted in the store, and the others are built.

        Raises:
            PassFailed: with the variant, the pass and its position: of the base, for lack of memory, or where the gate
                says `on_fail: abort`.
        """
        _set_threads(self._hardware.threads)
        self._store.sweep()
        unmade: set[str] = set()
        try:
            for step in work.steps:
                known = self._store.failure(step.key) is not None
                if known or unmade.intersection(step.parents) or not self._advance(step):
                    unmade.add(step.key)
        finally:
            self._evaluator.close()
            self._made = None
        self._compare(living(self._store, work))

    def _compare(self, work: Plan) -> None:
        """Time what was not timed yet on this machine; two builders never time at once."""
        store, hardware = self._store, self._hardware
        with store.lock("benchmark"), self._progress.artifact(None, "all, side by side"):
            known = {key: self._intact(self._benchmark_of(key, work.anchor)) for key in work.keys}
            untimed = [key for key, result in known.items() if result is None]
            fresh = benchmark(store, self._base, work.anchor, untimed, hardware) if untimed else []
            for result in fresh:
                store.keep_benchmark(result)
            timed = _present(known) | {result.key: result for result in fresh}
            self._compare_lanes([timed[key] for key in work.served if key in timed])

    def _benchmark_of(self, key: str, anchor: str) -> Callable[[], BenchmarkResult | None]:
        return partial(self._store.benchmark, key, anchor, *_machine(self._hardware))

    def _compare_lanes(self, timed: Sequence[BenchmarkResult]) -> None:
        """Measure what a lane per thread brings where that is not known."""
        store, hardware = self._store, self._hardware
        known = (self._intact(partial(store.lane_rates, item.key, *_machine(hardware))) for item in timed)
        unknown = [item for item, rates in zip(timed, known, strict=True) if rates is None]
        if hardware.threads > 1 and unknown:
            for rates in benchmark_lanes(store, self._base, unknown, hardware):
                store.keep_lane_rates(rates)

    def _advance(self, step: RecipeStep) -> bool:
        """Make sure that one artifact exists and is measured; `False`, and noted, if it cannot be made."""
        try:
            self._make_and_measure(step)
        except PassFailed as error:
            where = _where(step.variant, step.pass_, step.position) if step.pass_ else f"base '{self._base.name}'"
            if step.pass_ is None or not error.lasting or self._wants_abort(step.variant):
                raise PassFailed(f"{where}: {error}") from error
            self._store.keep_failure(step.key, Failure(reason=str(error)))
            self._progress.say(f"{where} cannot be applied, the variant is excluded: {error}")
            return False
        return True

    def _wants_abort(self, name: str) -> bool:
        variant = next(item for item in self._config.variants if item.name == name)
        return self._config.gate_of(variant).wants_abort

    def _make_and_measure(self, step: RecipeStep) -> None:
        kind = _kind(step)
        with self._store.lock(step.key), self._progress.artifact(step.variant, kind):
            recipe = self._recipe_of(step.key)
            if recipe is not None:
                self._made = None
            else:
                made = self._make(step)
                self._made = None if made is None else (step.key, made)
                recipe = self._recipe_of(step.key)
                assert recipe is not None
            measured = self._intact(lambda: self._store.measurement(step.key))
            if measured is None or (measured.cpu, measured.threads) != _machine(self._hardware):
                rows = self._measure(recipe).fidelity.memory_rows
                if rows is not None:
                    self._progress.say(f"{step.variant}: {kind}: there is memory for batches of at most {rows} rows")

    def _recipe_of(self, key: str) -> Recipe | None:
        try:
            return self._store.recipe(key)
        except ArtifactCorrupt as error:
            self._progress.say(f"damaged artifact is rebuilt: {error}")
            self._store.discard(key)
            return None

    def _intact(self, read: Callable[[], _Measured | None]) -> _Measured | None:
        """What was measured; `None`, with a message, if that is damaged."""
        try:
            return read()
        except ArtifactCorrupt as error:
            self._progress.say(f"damaged measurement is taken again: {error}")
            return None

    def _make(self, step: RecipeStep) -> Model | None:
        """Make and publish an artifact; its model, if that can do without the files that are gone now."""
        applied, seconds = self._apply(step)
        format_ = format_named(applied.model.format)
        with self._store.workspace(step.key) as folder:
            if _saves(step):
                format_.save(applied.model, folder)
            for place, path in applied.files.items():
                _copy(path, folder / place)
            size = self._size(step, format_, applied.model)
            self._store.publish(folder, self._recipe(step, applied, seconds, checksums(folder), size))
        return applied.model if format_.in_memory else None

    def _size(self, step: RecipeStep, format_: Format[Any], model: Model) -> ModelSize:
        """Only passes on torch modules change what is computed; lowering and what follows it keep it."""
        parent = self._store.recipe(step.parents[0]) if step.parents else None
        if parent is None or step.pass_ is None or "eager_module" in step.pass_.requires:
            return format_.size(model)
        return ModelSize(parent.macs, parent.parameters)

    def _parent(self, key: str) -> Model:
        """What was made last is at hand; anything else is loaded."""
        if self._made is not None and self._made[0] == key:
            return self._made[1]
        return load_model(self._store, self._base, key)

    def _apply(self, step: RecipeStep) -> tuple[Applied, float]:
        """The artifact's model and the seconds that making it took."""
        if step.pass_ is None:
            started = time.perf_counter()
            return Applied(self._base.model()), time.perf_counter() - started
        load = [partial(self._parent, key) for key in step.parents]
        models = OneByOne(load) if len(load) > 1 else [load[0]()]
        scratch = self._store.scratch(step.key)
        context = BuildContext(self._base, self._config.seed, self._hardware, scratch, self._progress, self._evaluator)
        started = time.perf_counter()
        try:
            return step.pass_.join(models, context), time.perf_counter() - started
        except StartupError:
            raise
        except ModuleNotFoundError as error:
            extra = "the extra 'cpu' (or 'gpu') brings the ONNX libraries: pip install 'leanserve[cpu]'"
            raise PassFailed(f"{error}; {extra}") from error
        except Exception as error:
            if is_out_of_memory(error):
                raise PassFailed(f"memory ran out in the pass: {error}", lasting=False) from error
            raise PassFailed(f"{type(error).__name__}: {error}", lasting=not isinstance(error, OSError)) from error

    def _recipe(
        self, step: RecipeStep, applied: Applied, seconds: float, files: dict[str, str], size: ModelSize
    ) -> Recipe:
        libraries = step.pass_.libraries if step.pass_ else format_named(applied.model.format).libraries
        return Recipe(
            key=step.key,
            parents=step.parents,
            base=self._base.name,
            kind=step.pass_.kind if step.pass_ else None,
            options=step.pass_.model_dump(mode="json") if step.pass_ else {},
            decisions=dict(applied.decisions),
            facts=dict(applied.facts),
            simulated=step.pass_.simulated if step.pass_ else False,
            format=applied.model.format if _saves(step) else None,
            spec=applied.model.spec,
            files=files,
            parameters=size.parameters,
            macs=size.macs,
            seconds=seconds,
            versions=versions_of(("leanserve", *libraries)),
            hardware=self._hardware,
        )

    def _measure(self, recipe: Recipe) -> Measurement:
        reference = self._base_answers(recipe) if recipe.parents else None
        measurement, answers = measure(self._store, self._base, recipe, reference, self._hardware)
        if not recipe.parents:
            self._reference = answers
        self._store.attach(recipe.key, measurement)
        return measurement

    def _base_answers(self, recipe: Recipe) -> GateOutputs:
        """The base's outputs on the gate split; run again if the base itself came from the cache."""
        if self._reference is None:
            root = self._store.ancestry(recipe.key)[0]
            _, self._reference = measure(self._store, self._base, root, None, self._hardware)
        return self._reference


def _saves(step: RecipeStep) -> bool:
    """Whether the artifact has a model of its own; a pass that acts at load time leaves it to the one before."""
    return step.pass_ is None or step.pass_.stage is not Stage.LOADING


def _copy(source: Path, place: Path) -> None:
    """A file or a folder that a pass brings into its artifact."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, place)
    else:
        shutil.copyfile(source, place)


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _kind(step: RecipeStep) -> str:
    return step.pass_.kind if step.pass_ else "base"


def _where(variant: str, pass_: Pass, position: int) -> str:
    return f"variant '{variant}', pass {position} ({pass_.kind})"
