"""The Open Inference Protocol V2 over the fleet, without a transport: what the service tells about itself, and infer.

The base is the *model*, its variants are the *versions*. Shared by the REST and the gRPC front, so that both choose,
refuse and describe alike. The bodies are those of REST; the messages of gRPC have the same fields.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import NamedTuple, TypeAlias

from leanserve import __version__
from leanserve.api.audit import AuditLog
from leanserve.api.caveats import caveat_parameters
from leanserve.api.service import Service
from leanserve.codecs.description import (
    Compute,
    Counters,
    Duration,
    in_sequences,
    model_config,
    model_metadata,
    statistics,
)
from leanserve.codecs.infer_plan import POSTPROCESS, InferOptions, WantedOutput
from leanserve.codecs.open_inference import InferDecoder
from leanserve.codecs.tensors import clip, ports
from leanserve.contracts import Array, Arrays, Json, ModelSpec, TensorSpec
from leanserve.errors import BadInput, NotFound
from leanserve.serving.session import DEFAULT_TERMS, Terms
from leanserve.serving.variant import Variant
from leanserve.telemetry.observations import BatchTimes, VariantMetrics
from leanserve.texts import STRING, dtype_name

EXTENSIONS = ("binary_tensor_data", "model_configuration", "parameters", "schedule_policy")
"""Those of Triton's extensions that clients may count on. Statistics are offered whole, but not announced:
`perf_analyzer` reads them where they are, takes versions for numbers and dies of a variant's name; where they are not,
it measures as well without them."""
REPOSITORY = "model_repository"
"""Announced where variants may be loaded and unloaded; else only the index is offered."""
INDEX_STATES = {"serving": "READY", "loading": "LOADING", "unloading": "UNLOADING"}
"""The protocol's word for a variant's state; any other is `UNAVAILABLE`."""

_Swap: TypeAlias = tuple[str, Callable[[str | None], Awaitable[None]]]


class PostInfer(NamedTuple):
    """Tensors that are not outputs of the model, and the options that ask for just these."""

    options: InferOptions
    arrays: Arrays


class OpenInference:
    """The protocol's view of a fleet.

    In all methods an empty or missing `version` leaves the choice to the service; `NotFound` is raised for a model or
    version that does not exist, `NotReady` for a version that was excluded by its gate or is not loaded.
    """

    def __init__(self, service: Service) -> None:
        """Raises `StartupError` where a variant takes or gives what the protocol cannot carry."""
        self.service = service
        self.fleet = service.fleet
        self.name = service.fleet.name
        self._base = service.base
        self._audit = AuditLog()
        self._swaps_allowed = service.config.model_control == "explicit"
        specs = {variant.spec for variant in self.fleet.opened.values()}
        self._decoders = {spec: InferDecoder(spec) for spec in specs}
        self._decoder_of = {variant: self._decoders[variant.spec] for variant in self.fleet.opened.values()}
        self.keeps_state = any(item.next_from for item in service.base.spec.inputs)
        self.takes_strings = any(item.dtype == STRING for spec in specs for item in spec.inputs)
        """Whether a tensor may hold texts, whose reading takes as long as that of JSON."""

    def decoder_of(self, variant: Variant) -> InferDecoder:
        """That of a variant, which knows the JSON headers of recent requests.

        The variant may be one that was opened since: a request that was on its way then is answered by who is there.
        """
        known = self._decoder_of.get(variant)
        return known or self._decoders.get(variant.spec) or InferDecoder(variant.spec)

    async def load(self, model: str, version: str | None, parameters: Iterable[str]) -> None:
        """Load what is not loaded of the model, or only this version; returns when it serves.

        Raises:
            BadInput: not allowed by the config, or a parameter that asks for something else than what was built.
            ServiceError: see `Fleet.load`.
        """
        await self._swap(("load", self.fleet.load), model, version, set(parameters))

    async def unload(self, model: str, version: str | None, parameters: Iterable[str]) -> None:
        """Unload the model, or only this version; returns when its memory is given back.

        Raises:
            BadInput: not allowed by the config, an unknown parameter, or it is the only version that serves.
            ServiceError: see `Fleet.unload`.
        """
        # Nothing here depends on another model: with its dependents is the same as without.
        await self._swap(("unload", self.fleet.unload), model, version, set(parameters) - {"unload_dependents"})

    async def _swap(self, wanted: _Swap, model: str, version: str | None, unknown: set[str]) -> None:
        self.check_model(model)
        if not self._swaps_allowed:
            raise BadInput("loading and unloading is not allowed; set model_control: explicit in the config")
        if unknown:
            named = ", ".join(clip(name) for name in sorted(unknown))
            raise BadInput(f"the parameters {named} are not taken: a version is loaded as it was built")
        action, swap = wanted
        name = version or None
        target = f"{model}/versions/{name}" if name else model
        await self._audit.do(action, target, partial(self._states, name), partial(swap, name))

    def _states(self, name: str | None) -> Json:
        """The state of a variant, or of all."""
        return {each: state for each, (state, _) in self.fleet.status_of.items() if name in {None, each}}

    def health(self) -> dict[str, Json]:
        """Both keys in one body, because clients differ in which one they read, whatever they asked."""
        return {"live": True, "ready": self.fleet.is_ready()}

    def check_live(self) -> None:
        """Raise `NotReady` where only a new process can help."""
        self.fleet.check_live()

    def check_ready(self, model: str | None = None, version: str | None = None) -> None:
        """Raise `NotReady` while draining, for a version that does not serve, and while none does."""
        if model is not None:
            self._serving(model, version)
        self.fleet.check_ready()

    def server_metadata(self) -> dict[str, Json]:
        """Name and version of this software, and the extensions of the protocol that it offers."""
        offered = list(EXTENSIONS)
        if self._swaps_allowed:
            offered.append(REPOSITORY)
        if self.keeps_state:
            offered.append("sequence")
        return {"name": "leanserve", "version": __version__, "extensions": sorted(offered)}

    def metadata(self, model: str, version: str | None = None) -> dict[str, Json]:
        """The tensors of the model; `versions` are the variants that serve."""
        asked = self._serving(model, version)
        return model_metadata(self._spec(version), self.name, list(self.fleet.variants), _platform(asked))

    def config(self, model: str, version: str | None = None) -> dict[str, Json]:
        """Batching as configured (`max_batch_size`, unless memory allows less, priorities) and as measured (the
        preferred size is the knee).

        Without a version it holds for all: the smallest maximum, the shortest delay, the fewest levels.
        """
        asked = self._serving(model, version)
        batches = {name: plan.batch for name, plan in self.fleet.plans.items()}
        spec = self._spec(version)
        knees = sorted({variant.batcher.limits.max_rows for variant in asked})
        config = model_config(
            spec,
            self.name,
            _platform(asked),
            spec.most_rows(min(variant.running.memory_rows or batches[variant.name].max_rows for variant in asked)),
            knees,
            round(min(batches[variant.name].max_delay_s for variant in asked) * 1e6),
        )
        fewest = min((variant.batcher.limits for variant in asked), key=lambda limits: limits.levels)
        priorities = {"priority_levels": fewest.levels, "default_priority_level": fewest.default_level}
        config["dynamic_batching"] |= priorities
        if self.keeps_state:
            kept = self.service.config.sequences
            config = in_sequences(config, spec, kept.most, round(kept.idle_s * 1e6))
        return config | caveat_parameters(self._base.caveats)

    def statistics(self, model: str | None = None, version: str | None = None) -> dict[str, Json]:
        """What the variants have done since they were loaded."""
        asked = self._serving(model or self.name, version)
        return statistics((self.name, variant.name, _counters(variant.metrics)) for variant in asked)

    def repository_index(self, *, ready_only: bool) -> list[dict[str, Json]]:
        """All variants; those excluded by their gate, and those unloaded, are `UNAVAILABLE`, with the reason."""
        index = []
        for name, (standing, reason) in self.fleet.status_of.items():
            state = INDEX_STATES.get(standing, "UNAVAILABLE")
            if state == "READY" or not ready_only:
                told = reason or ("unloaded" if standing == "unloaded" else "")
                index.append({"name": self.name, "version": name, "state": state, "reason": told})
        return index

    def postprocessed(self, options: InferOptions, outputs: Arrays, spec: ModelSpec) -> PostInfer:
        """What answers a request that asks for post-processing, which has no image to map boxes to.

        Raises:
            BadInput: the config has none.
        """
        chain = self.service.post
        if not chain.ends:
            raise BadInput(f"parameter {POSTPROCESS!r}: the config of this service has no section postprocess")
        arrays: dict[str, Array] = {}
        for name, columns in chain.answers(outputs, spec, (), chain.ends).items():
            arrays |= columns.named(name)
        binary = options.parameters.get("binary_data_output") is True
        told = ports(TensorSpec(name, dtype_name(array), array.shape[1:]) for name, array in arrays.items())
        wanted = tuple(WantedOutput(port, "binary" if binary else "json") for port in told.values())
        return PostInfer(options._replace(outputs=wanted), tuple(arrays.values()))

    def check_model(self, model: str) -> None:
        """Raise `NotFound` for another model."""
        if model != self.name:
            raise NotFound(f"no model '{model[:80]}'; this server has '{self.name}'")

    def _spec(self, version: str | None) -> ModelSpec:
        """Of a version its own; of the model that of the base."""
        return self.fleet.opened[version].spec if version else self._base.spec

    def _serving(self, model: str, version: str | None) -> list[Variant]:
        """The version that is asked for, or all that serve: at least one."""
        self.check_model(model)
        if version:
            return [self.fleet.choose(version, None)]
        if not self.fleet.variants:
            self.fleet.check_ready()  # raises
        return list(self.fleet.variants.values())


def terms_of(options: InferOptions) -> Terms:
    """The `priority` and the `timeout` of a request."""
    if not options.priority and options.timeout_us is None:
        return DEFAULT_TERMS
    return Terms(options.priority or 0, None if options.timeout_us is None else options.timeout_us / 1e6)


def _platform(variants: Iterable[Variant]) -> str:
    names = {variant.backend.name for variant in variants}
    return names.pop() if len(names) == 1 else "leanserve"


def _counters(seen: VariantMetrics) -> Counters:
    """The variant's numbers as the statistics extension counts: per request, and for batches per execution."""
    seen.catch_up()
    answered = seen.requests["ok"]
    others = [requests for outcome, requests in seen.requests.items() if outcome != "ok"]
    executed = seen.queue.count
    return Counters(
        last_inference_ms=round(seen.last_batch_at * 1000),
        inference_count=round(seen.rows.total),
        execution_count=seen.rows.count,
        success=_duration(answered.count, answered.total),
        fail=_duration(sum(other.count for other in others), sum(other.total for other in others)),
        queue=_duration(executed, seen.queue.total),
        compute=Compute(
            _duration(executed, seen.input_request_s),
            _duration(executed, seen.infer_request_s),
            _duration(executed, seen.output_request_s),
        ),
        batches={rows: _phases(times) for rows, times in seen.batches.items()},
    )


def _phases(times: BatchTimes) -> Compute:
    return Compute(
        _duration(times.count, times.input_s),
        _duration(times.count, times.infer_s),
        _duration(times.count, times.output_s),
    )


def _duration(count: int, seconds: float) -> Duration:
    return Duration(count, round(seconds * 1e9))
