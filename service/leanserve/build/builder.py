"""Building variants: a plain `for` over passes with a look into the prefix cache before each.

What is to be made stands in a `Plan` (`build.plan`). Building runs in a child process of the server: `leanserve build`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from leanserve.artifacts.benchmarks import QUIET, BenchmarkResult, LaneRates
from leanserve.artifacts.load import OneByOne, load_model
from leanserve.artifacts.manifest import Failure, Measurement, Recipe
from leanserve.artifacts.store import ArtifactStore, checksums
from leanserve.build.cache_key import RecipeStep, versions_of
from leanserve.build.peers import SharedPass, beside_peers
from leanserve.build.plan import Plan, known_only, living, machine_of, place_of, step_kind
from leanserve.build.progress import BuildProgress
from leanserve.config.schema import ServiceConfig
from leanserve.contracts import Base, BuildContext, Format, Model, ModelSize
from leanserve.errors import ArtifactCorrupt, PassFailed, StartupError
from leanserve.evaluation.candidates import CandidateEvaluator
from leanserve.evaluation.quality import GateOutputs, measure
from leanserve.evaluation.speed import Stopwatch
from leanserve.hardware import Hardware
from leanserve.memory import is_out_of_memory
from leanserve.passes.base import Applied, Stage
from leanserve.runtime.formats import format_named
from leanserve.runtime.formats.torch import training_device
from leanserve.timing import MEASURE_S

_Measured = TypeVar("_Measured", Measurement, BenchmarkResult, LaneRates)


class Builder:
    """Makes the missing artifacts of a plan, one by one; `measure_s` bounds the time that timing them may take."""

    def __init__(
        self,
        store: ArtifactStore,
        config: ServiceConfig,
        base: Base,
        hardware: Hardware,
        progress: BuildProgress,
        measure_s: float = MEASURE_S,
    ) -> None:
        self._store = store
        self._config = config
        self._base = base
        self._hardware = hardware
        self._progress = progress
        self._stopwatch = Stopwatch(store, base, hardware, measure_s, progress)
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
                known = self._is_known_to_fail(step, work)
                if known or unmade.intersection(step.parents) or not self._advance(step):
                    unmade.add(step.key)
        finally:
            self._evaluator.close()
            self._made = None
        self._compare(living(self._store, work))

    def _is_known_to_fail(self, step: RecipeStep, work: Plan) -> bool:
        if step.pass_ is not None and step.key in work.refused:
            where = place_of(step.variant, step.pass_, step.position)
            self._progress.say(f"{where} cannot be applied here, the variant is excluded: {work.refused[step.key]}")
            return True
        return self._store.failure(step.key) is not None

    def _compare(self, work: Plan) -> None:
        """Time what was not timed yet on this machine; two builders never time at once."""
        store = self._store
        with store.lock("benchmark"), self._progress.artifact(None, "all, side by side"):
            known = {key: self._intact(self._benchmark_of(key, work.anchor)) for key in work.keys}
            untimed = [key for key, result in known.items() if result is None or result.disturbed]
            fresh = self._stopwatch.beside_anchor(work.anchor, untimed) if untimed else []
            fresh = [result for result in fresh if _is_better(result, known[result.key])]
            for result in fresh:
                store.keep_benchmark(result)
            if fresh and (waited := max(result.waited for result in fresh)) > QUIET:
                self._progress.say(
                    f"other work disturbed the timing (threads waited {waited:.0%} of a turn for a processor), and "
                    "speeds are marked so; on a quiet machine `leanserve build` measures them again"
                )
            timed = known_only(known) | {result.key: result for result in fresh}
            self._compare_lanes([timed[key] for key in work.served if key in timed])

    def _benchmark_of(self, key: str, anchor: str) -> Callable[[], BenchmarkResult | None]:
        return partial(self._store.benchmark, key, anchor, *machine_of(self._hardware))

    def _compare_lanes(self, timed: Sequence[BenchmarkResult]) -> None:
        """Measure what a lane per thread brings where that is not known."""
        store, hardware = self._store, self._hardware
        known = (self._intact(partial(store.lane_rates, item.key, *machine_of(hardware))) for item in timed)
        unknown = [item for item, rates in zip(timed, known, strict=True) if rates is None]
        if hardware.threads > 1 and unknown:
            for rates in self._stopwatch.lanes(unknown):
                store.keep_lane_rates(rates)

    def _advance(self, step: RecipeStep) -> bool:
        """Make sure that one artifact exists and is measured; `False`, and noted, if it cannot be made."""
        try:
            self._make_and_measure(step)
        except PassFailed as error:
            where = place_of(step.variant, step.pass_, step.position) if step.pass_ else f"base '{self._base.name}'"
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
        kind = step_kind(step)
        with self._store.lock(step.key), self._progress.artifact(step.variant, kind):
            recipe = self.make(step)
            measured = self._intact(lambda: self._store.measurement(step.key))
            if measured is None or not self._holds(measured):
                rows = self._measure(recipe).fidelity.memory_rows
                if rows is not None:
                    self._progress.say(f"{step.variant}: {kind}: there is memory for batches of at most {rows} rows")

    def make(self, step: RecipeStep) -> Recipe:
        """One artifact of which all parents exist, made unless it exists too; it is not measured.

        Raises:
            PassFailed: the pass cannot be applied.
        """
        recipe = self._recipe_of(step.key)
        if recipe is not None:
            self._made = None
            return recipe
        made = self._make(step)
        self._made = None if made is None else (step.key, made)
        recipe = self._recipe_of(step.key)
        assert recipe is not None
        return recipe

    def _holds(self, measured: Measurement) -> bool:
        """Whether answers were computed on this machine, and scored as now."""
        here = (measured.cpu, measured.threads) == machine_of(self._hardware)
        return here and measured.score_digest == self._base.score_digest

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
        context = BuildContext(
            self._base,
            self._config.seed,
            self._hardware,
            scratch,
            self._progress,
            self._evaluator,
            training_device(self._hardware),
        )
        started = time.perf_counter()
        try:
            with beside_peers(SharedPass(step.pass_, step.parents, self._store), context) as own:
                return step.pass_.join(models, own), time.perf_counter() - started
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
            simulated=_simulated(step, applied),
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


def _simulated(step: RecipeStep, applied: Applied) -> bool:
    if step.pass_ is None:
        return False
    return step.pass_.simulated if applied.simulated is None else applied.simulated


def _is_better(fresh: BenchmarkResult, known: BenchmarkResult | None) -> bool:
    """Whether a speed was not known, or is less disturbed than what was."""
    return known is None or fresh.waited < known.waited


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
