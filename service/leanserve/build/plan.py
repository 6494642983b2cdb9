"""What a config comes to: the steps that make its variants, and what is known of them in the store.

Nothing is made here and nothing heavy imported, so that a second start knows at once that nothing is to be done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

from leanserve.artifacts.benchmarks import BenchmarkResult, BenchmarkSet, LaneRates
from leanserve.artifacts.manifest import Manifest, Measurement, VariantReport
from leanserve.artifacts.store import ArtifactStore
from leanserve.build.cache_key import RecipeStep, steps_of
from leanserve.config.schema import ServiceConfig
from leanserve.config.variant_section import VariantConfig
from leanserve.contracts import Base
from leanserve.errors import ArtifactCorrupt, GateFailed, PassFailed
from leanserve.evaluation.gate import judged
from leanserve.hardware import Hardware
from leanserve.passes.base import Pass

_Measured = TypeVar("_Measured", Measurement, BenchmarkResult, LaneRates)


@dataclass(frozen=True)
class Plan:
    """Every variant with the steps that make it, in building order."""

    recipes: tuple[tuple[VariantConfig, tuple[RecipeStep, ...]], ...]
    refused: Mapping[str, str] = field(default_factory=dict)
    """Key of a step whose pass this machine cannot apply or would not gain by -> why."""
    score_digest: str = ""
    """Of the score by which answers must have been measured (`contracts.Base`)."""

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
        PassFailed: this machine cannot apply a pass, and the variant's gate says `on_fail: abort`.
    """
    recipes = tuple((variant, steps_of(config, base, variant, hardware)) for variant in config.variants)
    refused = {}
    for variant, steps in recipes:
        for step in steps:
            if step.pass_ is not None and (reason := step.pass_.unsupported_reason(hardware)):
                refused[step.key] = reason
                if config.gate_of(variant).wants_abort:
                    raise PassFailed(f"{place_of(step.variant, step.pass_, step.position)}: {reason}")
    return Plan(recipes, refused, base.score_digest)


def living(store: ArtifactStore, work: Plan) -> Plan:
    """The plan with the base alone in the place of every variant that cannot be made."""
    recipes = ((variant, steps[:1] if failed_step(store, work, steps) else steps) for variant, steps in work.recipes)
    return replace(work, recipes=tuple(recipes))


def failed_step(store: ArtifactStore, work: Plan, steps: Sequence[RecipeStep]) -> tuple[RecipeStep, str] | None:
    """The first step that this machine refuses, or that was tried and could not be made, and why."""
    for step in steps:
        if step.key in work.refused:
            return step, work.refused[step.key]
        if (failure := store.failure(step.key)) is not None:
            return step, failure.reason
    return None


def stored_benchmark(store: ArtifactStore, work: Plan, hardware: Hardware) -> BenchmarkSet | None:
    """How fast all artifacts are on this machine, with lanes too if there are threads for several; `None`: not known.

    Where that is missing from a cache that cannot be written: how fast they are on another machine, if possible with as
    many threads.

    Raises:
        ArtifactCorrupt: what was timed on this machine is damaged.
    """
    work = living(store, work)
    here = _benchmark_on(store, work, machine_of(hardware))
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
    return BenchmarkSet(cpu, threads, work.anchor, known_only(results), known_only(lanes))


def _intact_benchmark(store: ArtifactStore, work: Plan, machine: tuple[str, int]) -> BenchmarkSet | None:
    with suppress(ArtifactCorrupt):
        return _benchmark_on(store, work, machine)
    return None


def machine_of(hardware: Hardware) -> tuple[str, int]:
    """What tells machines apart whose measurements are not compared."""
    return hardware.machine, hardware.threads


def known_only(found: Mapping[str, _Measured | None]) -> dict[str, _Measured]:
    return {key: item for key, item in found.items() if item is not None}


def shortfall(store: ArtifactStore, work: Plan, hardware: Hardware) -> str | None:
    """What has to be built or measured before anything can be served, in words; `None`: nothing."""
    try:
        alive = living(store, work)
        timed = stored_benchmark(store, work, hardware) or _benchmark_on(store, alive, machine_of(hardware))
        for step in alive.steps:
            if store.manifest(step.key, timed, work.score_digest) is None:
                missing = "not built" if store.recipe(step.key) is None else "not measured on this machine"
                return f"{step.variant}: {step_kind(step)} is {missing}"
        if not timed.covers(alive.keys, alive.served):
            return "the gain of several lanes is not measured on this machine"
    except ArtifactCorrupt as error:
        return str(error)
    return None


def machines(store: ArtifactStore, work: Plan, hardware: Hardware) -> list[str]:
    """Where the reported numbers were measured, if not here: a processor and its threads each."""
    timed = stored_benchmark(store, work, hardware)
    measured = [timed, *(store.measurement(key) for key in living(store, work).keys)]
    found = {(item.cpu, item.threads) for item in measured if item is not None} - {machine_of(hardware)}
    return [Hardware(*machine).words for machine in sorted(found)]


def reports(store: ArtifactStore, config: ServiceConfig, work: Plan, hardware: Hardware) -> list[VariantReport]:
    """Every variant with its manifests and the gate's word.

    Raises:
        GateFailed: a variant fails a gate that says `on_fail: abort`, or cannot be made and has such a gate.
        ArtifactCorrupt: an artifact is missing or damaged.
    """
    timed = stored_benchmark(store, work, hardware)
    alive = living(store, work)
    manifests = {key: store.manifest(key, timed, work.score_digest) for key in alive.keys} if timed else {}
    found = []
    for (variant, steps), (_, every) in zip(alive.recipes, work.recipes, strict=True):
        ancestry = tuple(manifest for step in steps if (manifest := manifests.get(step.key)))
        if len(ancestry) != len(steps):
            raise ArtifactCorrupt(f"variant '{variant.name}' is not built; run `leanserve build`")
        failed = failed_step(store, work, every)
        found.append(
            _report(config, variant, ancestry) if failed is None else _unmade(config, variant, ancestry, failed)
        )
    return found


def _report(config: ServiceConfig, variant: VariantConfig, ancestry: tuple[Manifest, ...]) -> VariantReport:
    gate = config.gate_of(variant)
    reason, doubt = judged(gate, ancestry[-1].quality, ancestry[0].quality, compressed=len(ancestry) > 1)
    if reason and gate.on_fail == "abort":
        remedy = "Soften its passes, allow more, or set on_fail: exclude."
        raise GateFailed(f"variant '{variant.name}' fails its gate: {reason}. {remedy}")
    return VariantReport(
        name=variant.name,
        state="excluded" if reason else "serving",
        reason=reason,
        doubt=None if reason else doubt,
        parents=variant.parent_names,
        ancestry=ancestry,
    )


def _unmade(
    config: ServiceConfig, variant: VariantConfig, ancestry: tuple[Manifest, ...], failed: tuple[RecipeStep, str]
) -> VariantReport:
    """The report of a variant of which a pass could not be applied."""
    step, reason = failed
    whose = "" if step.variant == variant.name else f" of its parent '{step.variant}'"
    reason = f"pass {step.position} ({step_kind(step)}){whose} cannot be applied: {reason}"
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


def step_kind(step: RecipeStep) -> str:
    """The kind of the step's pass; the base is a kind of its own."""
    return step.pass_.kind if step.pass_ else "base"


def place_of(variant: str, pass_: Pass, position: int) -> str:
    """A pass of a variant, as messages name it."""
    return f"variant '{variant}', pass {position} ({pass_.kind})"
