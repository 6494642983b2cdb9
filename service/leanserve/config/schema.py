"""The one YAML file: frozen, typed, validated whole before any work; unknown keys are errors.

`read_config` is the only way in. Its errors name the file, the line, the key and what would be right.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from leanserve.codecs.postprocess import AnyStep
from leanserve.config.auth_section import AuthConfig, TlsConfig
from leanserve.config.base_section import AnyBase, OnnxBase, TorchExportBase
from leanserve.config.data_section import AnyData
from leanserve.config.device_choice import DeviceChoice
from leanserve.config.errors import describe, kind_of
from leanserve.config.experiment_section import ExperimentConfig, HardwareConfig
from leanserve.config.limits_section import LimitsConfig
from leanserve.config.lineage import building_order, parents_fault
from leanserve.config.score_section import AnyScore
from leanserve.config.section import Section
from leanserve.config.traffic_section import TrafficConfig, traffic_fault
from leanserve.config.variant_section import BatchConfig, GateConfig, Isolation, VariantConfig
from leanserve.config.watchdog_section import WatchdogConfig
from leanserve.config.yaml import read_yaml
from leanserve.errors import ConfigError
from leanserve.passes import ALL
from leanserve.passes.base import BASE_TAGS, GRAPH_TAGS, PROGRAM_TAGS, Tag
from leanserve.passes.composition import ModelState, find_violation, state_after

AtLeastOne = Annotated[int, Field(ge=1, le=4096, strict=True)]
"""Threads, of which no machine has more. Strict: in YAML `yes` is a truth value, which would pass for 1."""


class EmbeddingsConfig(Section):
    """What `/v1/embeddings` takes."""

    token_ids: Literal["refuse", "own"] = Field(
        "refuse",
        description="instead of texts; own: clients send ids of the model's own tokenizer, special ones included",
    )


def _origin(value: str) -> str:
    if not re.fullmatch(r"\*|(?!http://.*:80$|https://.*:443$)[a-z][a-z0-9+.-]*://[^A-Z/?#@\s]+", value):
        raise ValueError(
            "an origin is written as browsers send it, https://app.example.com or http://localhost:3000: in lower "
            "case, without a path, and without the port that its scheme has anyway; '*' stands for any"
        )
    return value


def _header_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", value):
        raise ValueError("this is no name of a header; '*' stands for any")
    return value


class CorsConfig(Section):
    """Which web pages may use the service from a browser."""

    origins: tuple[Annotated[str, AfterValidator(_origin)], ...] = Field(
        (), description="origins of the pages, or '*' for any; none: no page of another origin may"
    )
    headers: tuple[Annotated[str, AfterValidator(_header_name)], ...] = Field(
        ("*",), description="request headers that pages may send besides the service's own; '*' for any"
    )
    credentials: bool = Field(default=False, description="pages may send cookies and the like")
    max_age_s: int = Field(600, ge=0, le=86_400, description="how long a browser may remember what it was told")

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if not self.origins and self.model_fields_set - {"origins"}:
            raise ValueError("without 'origins' nothing here has an effect; name the origins of your pages")
        if "*" in self.origins and (len(self.origins) > 1 or self.credentials):
            raise ValueError(
                "the origin '*' goes neither with others nor with 'credentials'; name the origins of your pages"
            )
        return self


class SequencesConfig(Section):
    """What is kept for clients of a model with state (`base.state`)."""

    most: int = Field(1000, ge=1, description="sequences that are open at a time; beyond it 429")
    state_bytes: int = Field(256 * 2**20, ge=1, description="of their states together; beyond it 429")
    idle_s: float = Field(60.0, gt=0, description="after which a sequence is forgotten that nobody has asked for")


class DrainConfig(Section):
    """What happens on SIGTERM."""

    delay_s: float = Field(5.0, ge=0, description="go on serving this long after /readyz turned 503")
    timeout_s: float = Field(30.0, ge=0, description="then finish open requests for at most this long")


class ServiceConfig(Section):
    """The whole file."""

    base: AnyBase = Field(description="the model that the variants compress")
    data: AnyData | None = Field(None, description="rows for calibration, training and the gate")
    score: AnyScore | None = Field(
        None, description="how answers are judged against labels; by default by what the model gives"
    )
    variants: tuple[VariantConfig, ...] = Field(min_length=1)
    postprocess: tuple[AnyStep, ...] = Field((), description="what becomes of outputs before clients see them")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of every pass that draws random numbers")
    threads: AtLeastOne | Literal["auto"] = Field(
        "auto", description="CPU threads for inference; auto = quota and affinity"
    )
    device: DeviceChoice = Field("auto", description="what variants run on; auto = a GPU that all engines can use")
    lanes: AtLeastOne | Literal["auto"] = Field("auto", description="batches at a time; auto = measured by the build")
    pin: bool = Field(
        default=True, description="threads stay on processors of their own, where they are as many as these"
    )
    cache: Path = Field(Path(".leanserve"), description="folder of the artifact store")
    isolation: Isolation = Field("none", description="process: variants run in workers, which may crash or hang alone")
    stuck_after_s: float = Field(
        10.0, gt=0, description="a worker that runs one batch for longer is stuck and is killed"
    )
    gate: GateConfig = GateConfig()
    batch: BatchConfig = BatchConfig()
    traffic: TrafficConfig = TrafficConfig()
    experiment: ExperimentConfig = ExperimentConfig()
    hardware: HardwareConfig = HardwareConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    limits: LimitsConfig = LimitsConfig()
    sequences: SequencesConfig = SequencesConfig()
    cors: CorsConfig = CorsConfig()
    auth: AuthConfig = AuthConfig()
    tls: TlsConfig | None = Field(None, description="certificate of both ports; none: plain text")
    drain: DrainConfig = DrainConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    on_sighup: Literal["reload", "drain"] = Field(
        "reload", description="what SIGHUP does: read this file again, or end"
    )
    model_control: Literal["none", "explicit"] = Field("none", description="explicit: clients may load and unload")

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        names = [variant.name for variant in self.variants]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(f"variants[{index}]: the name '{name}' is used twice")
        if fault := traffic_fault(self.traffic, names):
            raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _passes_compose(self) -> Self:
        if fault := parents_fault(self.variants):
            raise ValueError(fault)
        states: dict[str, ModelState] = {}
        for variant in building_order(self.variants):
            parents = [states[name] for name in variant.parent_names] or [ModelState(self.base_tags)]
            violation = find_violation(variant.passes, parents)
            if violation is not None:
                place = f"variants[{self.variants.index(variant)}].passes[{violation.position}]"
                raise ValueError(f"{place} of variant '{variant.name}': {violation.message}{self._what_applies()}")
            states[variant.name] = state_after(variant.passes, parents)
        return self

    @model_validator(mode="after")
    def _workers_end_before_the_service(self) -> Self:
        isolated = next((variant.name for variant in self.variants if self.isolation_of(variant) == "process"), None)
        if isolated is not None and self.stuck_after_s >= self.watchdog.batch_s:
            raise ValueError(
                f"stuck_after_s is {self.stuck_after_s:g} and watchdog.batch_s {self.watchdog.batch_s:g}: a batch that "
                f"hangs in the worker of variant '{isolated}' would end the service before it ends the worker; make "
                "stuck_after_s the smaller one"
            )
        return self

    def _what_applies(self) -> str:
        """For a base on which only some passes can work at all: which."""
        if self.base_tags == BASE_TAGS:
            return ""
        able = [kind_of(known) for known in ALL if known.requires <= self.base_tags]
        return f" To a base of the form '{self.base.kind}' apply only: {', '.join(able)}."

    @property
    def base_tags(self) -> frozenset[Tag]:
        """What passes may assume of the base."""
        if isinstance(self.base, OnnxBase):
            return GRAPH_TAGS
        return PROGRAM_TAGS if isinstance(self.base, TorchExportBase) else BASE_TAGS

    def variant(self, name: str) -> VariantConfig:
        """The section of the variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)

    def gate_of(self, variant: VariantConfig) -> GateConfig:
        """The variant's own gate, else the common one."""
        return variant.gate or self.gate

    def isolation_of(self, variant: VariantConfig) -> Isolation:
        """The variant's own isolation, else the common one."""
        return variant.isolation or self.isolation

    def batch_of(self, variant: VariantConfig) -> BatchConfig:
        """The variant's own batch settings, else the common ones."""
        return variant.batch or self.batch


def read_config(path: Path) -> ServiceConfig:
    """Read and validate a config file.

    Raises:
        ConfigError: one line per problem, each starting with `file:line`.
    """
    source = read_yaml(path)
    if not isinstance(source.value, dict):
        raise ConfigError(f"{path}:1: the config must be a mapping with the keys 'base' and 'variants'")
    try:
        return ServiceConfig.model_validate(source.value)
    except ValidationError as error:
        raise ConfigError("\n".join(describe(source, error.errors(), ServiceConfig))) from error
