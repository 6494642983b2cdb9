"""The section `traffic`: who answers a request that names no variant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from leanserve.config.section import Section


class TrafficConfig(Section):
    """Which variant answers a request that names none."""

    weights: dict[str, Annotated[float, Field(ge=0, le=1e9)]] = Field(
        default_factory=dict, description="share per variant; by default the first variant, the base, has all"
    )
    caps: dict[str, Annotated[float, Field(gt=0, le=1e9)]] = Field(
        default_factory=dict, description="most requests per second per variant; the base answers what is beyond"
    )
    sticky_header: str = Field("x-caller-key", description="requests with the same value here get the same variant")


def traffic_fault(traffic: TrafficConfig, names: Sequence[str]) -> str:
    """What is wrong with the section for variants of these names, the base first; empty if nothing is."""
    for key, given in (("weights", traffic.weights), ("caps", traffic.caps)):
        for name in given:
            if name not in names:
                return f"traffic.{key} names '{name}', which is no variant; variants are {', '.join(names)}"
    if traffic.weights and not any(traffic.weights.values()):
        return "traffic.weights: at least one weight must be above 0"
    if names[0] in traffic.caps:
        return f"traffic.caps: '{names[0]}' answers what is beyond the caps of others; it cannot have one"
    return ""
