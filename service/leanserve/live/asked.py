"""What admin verbs take: bodies in JSON, checked whole."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from leanserve.config.section import Name
from leanserve.errors import BadInput

_Body = TypeVar("_Body", bound=BaseModel)
_Weights = dict[str, Annotated[float, Field(ge=0, le=1e9)]]
_Caps = dict[str, Annotated[float, Field(gt=0, le=1e9)]]


class Asked(BaseModel):
    """A body."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TrafficWish(Asked):
    """`PUT /v1/experiment`: what is given replaces what is there, whole."""

    weights: _Weights | None = None
    caps: _Caps | None = None
    write: bool = False
    """Also into the config file."""


class StartWish(Asked):
    """`POST /v1/experiment/start`: what is not said is as the config has it."""

    candidate: str
    base: str | None = None
    name: Name | None = None
    shadow_share: float | None = Field(None, ge=0, le=1)
    shadow_time: float | None = Field(None, gt=0, le=1)
    stages: tuple[float, ...] | None = None
    min_stage_s: float | None = Field(None, ge=0)
    on_inconclusive: Literal["hold", "rollback"] | None = None
    limits: dict[str, Any] = Field(default_factory=dict)


class EndWish(Asked):
    """`POST /v1/experiment/promote` and `/abort`."""

    reason: str = Field("", max_length=1000)
    write: bool = False
    """Of a promotion: also into the config file."""


def read_wish(kind: type[_Body], body: Any) -> _Body:
    """The body as what it should be.

    Raises:
        BadInput: it is not; the text names each key and what would be right.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise BadInput("; ".join(_told(item) for item in error.errors())) from None


def _told(item: Any) -> str:
    place = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        return f"'{place[:80]}' is not taken"
    return f"{place}: {item['msg'].removeprefix('Value error, ')}" if place else item["msg"]
