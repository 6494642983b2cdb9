"""The one YAML file: frozen, typed, validated whole before any work; unknown keys are errors.

`read_config` is the only way in. Its errors name the file, the line, the key and what would be right.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.compression.passes import AnyPass
from service.compression.passes.composition import find_violation
from service.errors import ConfigError
from service.yaml_source import YamlSource, read_yaml


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", value):
        raise ValueError("a name is 1-63 letters, digits, '.', '_' or '-', and starts with a letter or digit")
    return value


Name = Annotated[str, AfterValidator(_name)]


class Section(BaseModel):
    """A part of the config file."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class GateConfig(Section):
    """When a variant answers too differently from its base to be served."""

    max_drop: float | None = Field(None, ge=0, le=1, description="largest allowed loss of score, 0.005 = half a point")
    min_agreement: float | None = Field(None, ge=0, le=1, description="least share of answers equal to the base's")
    on_fail: Literal["abort", "exclude"] = Field("abort", description="refuse to start, or serve without the variant")


class BatchConfig(Section):
    """How requests share a forward pass."""

    max_rows: int = Field(32, ge=1, le=4096, description="most rows in a batch; larger requests are split")
    max_delay_ms: float = Field(0.0, ge=0, le=10_000, description="how long an idle device waits for more rows")
    queue_rows: int = Field(512, ge=1, description="rows that may wait; beyond it requests are refused with 429")
    timeout_ms: float = Field(10_000.0, gt=0, description="longest wait in the queue; beyond it 504")


class TrafficConfig(Section):
    """Which variant answers a request that names none."""

    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="share per variant; all equal by default"
    )
    sticky_header: str = Field("x-caller-key", description="requests with the same value here get the same variant")


class LimitsConfig(Section):
    """Bounds on what a client may send."""

    body_bytes: int = Field(16 * 2**20, ge=1, description="largest request body")


class DrainConfig(Section):
    """What happens on SIGTERM."""

    delay_s: float = Field(5.0, ge=0, description="go on serving this long after /readyz turned 503")
    timeout_s: float = Field(30.0, ge=0, description="then finish open requests for at most this long")


class VariantConfig(Section):
    """The base and an ordered list of passes."""

    name: Name
    passes: tuple[AnyPass, ...] = ()
    gate: GateConfig | None = Field(None, description="overrides the common gate")
    batch: BatchConfig | None = Field(None, description="overrides the common batch settings")

    @model_validator(mode="after")
    def _passes_compose(self) -> Self:
        violation = find_violation(self.passes)
        if violation is not None:
            raise ValueError(f"pass {violation.position + 1} of variant '{self.name}': {violation.message}")
        return self


class ServiceConfig(Section):
    """The whole file."""

    base: Name = Field(description="the model that the variants compress")
    variants: tuple[VariantConfig, ...] = Field(min_length=1)
    seed: int = Field(0, ge=0, lt=2**32, description="seed of every pass that draws random numbers")
    threads: int | Literal["auto"] = Field("auto", description="CPU threads for inference; auto = quota and affinity")
    cache: Path = Field(Path(".leanserve"), description="folder of the artifact store")
    gate: GateConfig = GateConfig()
    batch: BatchConfig = BatchConfig()
    traffic: TrafficConfig = TrafficConfig()
    limits: LimitsConfig = LimitsConfig()
    drain: DrainConfig = DrainConfig()

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        names = [variant.name for variant in self.variants]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(f"variants[{index}]: the name '{name}' is used twice")
        for name in self.traffic.weights:
            if name not in names:
                raise ValueError(f"traffic.weights names '{name}', which is no variant; variants are {', '.join(names)}")
        if self.traffic.weights and not any(self.traffic.weights.values()):
            raise ValueError("traffic.weights: at least one weight must be above 0")
        if self.threads != "auto" and self.threads < 1:
            raise ValueError("threads must be 'auto' or at least 1")
        return self

    def gate_of(self, variant: VariantConfig) -> GateConfig:
        """The variant's own gate, else the common one."""
        return variant.gate or self.gate

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
        lines = [_describe(source, item) for item in error.errors(include_url=False)]
        raise ConfigError("\n".join(lines)) from error


def _describe(source: YamlSource, item: Any) -> str:
    steps = item["loc"] + _steps_in(item["msg"])
    text = item["msg"].removeprefix("Value error, ")
    where = ".".join(str(step) for step in item["loc"])
    if item["type"] == "extra_forbidden":
        text = f"unknown key '{steps[-1]}'{_suggestion(item['loc'])}"
    elif item["type"] == "missing":
        text = f"the key '{steps[-1]}' is missing"
    elif item["type"] in {"union_tag_invalid", "union_tag_not_found"}:
        text = _unknown_pass(item)
    elif where:
        text = f"{text} (got {item['input']!r})" if _is_scalar(item["input"]) else text
    return f"{source.place(steps)}: {where + ': ' if where else ''}{text}"


def _steps_in(message: str) -> tuple[str | int, ...]:
    """Validators of a whole section cannot give a location; their texts name it in a fixed form."""
    if found := re.match(r"Value error, variants\[(\d+)\]", message):
        return ("variants", int(found[1]), "name")
    if found := re.match(r"Value error, pass (\d+) of variant", message):
        return ("passes", int(found[1]) - 1)
    if found := re.match(r"Value error, traffic\.weights(?: names '([^']+)')?", message):
        return ("traffic", "weights", *found.groups(""))
    if message.startswith("Value error, threads"):
        return ("threads",)
    return ()


def _suggestion(location: tuple[str | int, ...]) -> str:
    known = _keys_at(location[:-1])
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; known keys are {', '.join(sorted(known))}"


def _keys_at(location: tuple[str | int, ...]) -> list[str]:
    """Keys of the section at a location, found by walking the JSON schema."""
    from service.compression.passes import ALL

    if "passes" in location:
        kinds = {pass_.model_fields["kind"].default or _kind_of(pass_): pass_ for pass_ in ALL}
        section: type[BaseModel] = next((kinds[step] for step in location if step in kinds), VariantConfig)
        return list(section.model_fields)
    section = ServiceConfig
    for step in location:
        sections = {"gate": GateConfig, "batch": BatchConfig, "traffic": TrafficConfig, "limits": LimitsConfig}
        sections |= {"drain": DrainConfig, "variants": VariantConfig}
        section = sections.get(str(step), section)
    return list(section.model_fields)


def _kind_of(pass_: type[BaseModel]) -> str:
    literal = pass_.model_fields["kind"].annotation
    return str(literal.__args__[0])  # type: ignore[union-attr]


def _unknown_pass(item: Any) -> str:
    from service.compression.passes import ALL

    kinds = sorted(_kind_of(pass_) for pass_ in ALL)
    if item["type"] == "union_tag_not_found":
        return f"a pass is written {{kind: NAME, option: value}}; kinds are {', '.join(kinds)}"
    wrong = str(item["ctx"]["tag"])
    near = difflib.get_close_matches(wrong, kinds, n=1)
    return f"unknown pass '{wrong}'" + (f"; did you mean '{near[0]}'?" if near else f"; kinds are {', '.join(kinds)}")


def _is_scalar(value: object) -> bool:
    return isinstance(value, (str, int, float, bool)) or value is None
