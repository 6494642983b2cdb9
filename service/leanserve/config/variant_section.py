"""The section of a variant: what it is made of, when it is served, and how its requests share a batch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from leanserve.config.section import Name, Section
from leanserve.passes import AnyPass

MAX_BATCH_DEPENDENCE = 0.02
"""Change of an answer by the rows that share its batch, relative to the largest output, that is still taken for
rounding: other kernels for other batch sizes add in another order, and 8 bits round what comes of it to their steps."""
Isolation = Literal["none", "process"]
"""Whether a variant runs in the service's own process, or in a worker that may crash."""


class GateConfig(Section):
    """When a variant answers too differently from its base to be served."""

    max_drop: float | None = Field(None, ge=0, le=1, description="largest allowed loss of score, 0.005 = half a point")
    min_agreement: float | None = Field(None, ge=0, le=1, description="least agreement of every output with the base's")
    max_batch_dependence: float | None = Field(
        MAX_BATCH_DEPENDENCE,
        ge=0,
        description="largest allowed change of an answer by the rows that share its batch, relative to the largest "
        "output; null: any",
    )
    min_speedup: float | None = Field(
        None, gt=0, description="least throughput, as a multiple of the base's, of variants that have passes"
    )
    undecided: Literal["pass", "fail"] = Field(
        "pass",
        description="of a variant that keeps a limit, while its 95 % interval reaches beyond it",
    )
    on_fail: Literal["abort", "exclude"] = Field(
        "abort",
        description="refuse to start, or serve without the variant; one of which a pass cannot be applied is excluded "
        "unless abort is written down",
    )

    @property
    def wants_abort(self) -> bool:
        """Whether a variant that cannot be made ends the start: only where that was asked for."""
        return self.on_fail == "abort" and "on_fail" in self.model_fields_set


class BatchConfig(Section):
    """How requests share a forward pass."""

    max_rows: int = Field(32, ge=1, le=4096, description="most rows in a batch; larger requests are split")
    max_delay_ms: float = Field(0.0, ge=0, le=10_000, description="how long an idle device waits for more rows")
    queue_rows: int = Field(
        512, ge=1, le=10**9, description="rows that may wait; beyond it requests are refused with 429"
    )
    timeout_ms: float = Field(10_000.0, gt=0, description="longest wait in the queue; beyond it 504")
    priority_levels: int = Field(3, ge=1, le=16, description="priorities 1 (most urgent) to this one")
    default_priority: int | None = Field(None, ge=1, description="of requests that name none; the middle by default")

    @model_validator(mode="after")
    def _default_is_a_level(self) -> Self:
        if self.default_level > self.priority_levels:
            raise ValueError(
                f"default_priority {self.default_priority} is beyond priority_levels {self.priority_levels}"
            )
        return self

    @property
    def default_level(self) -> int:
        """The priority level of a request that names none."""
        return self.default_priority or (self.priority_levels + 1) // 2


class VariantConfig(Section):
    """The base, or other variants, and an ordered list of passes."""

    name: Name
    parent: Name | None = Field(None, description="the variant that it goes on from; the base by default")
    parents: tuple[Name, ...] = Field((), description="several variants instead, which the first pass joins")
    passes: tuple[AnyPass, ...] = ()
    gate: GateConfig | None = Field(None, description="overrides the common gate")
    batch: BatchConfig | None = Field(None, description="overrides the common batch settings")
    device_share: float = Field(
        1.0, ge=0.01, le=100, description="its part of the device's time while others want it too, beside theirs"
    )
    isolation: Isolation | None = Field(None, description="overrides the common isolation")

    @property
    def parent_names(self) -> tuple[str, ...]:
        """The variants that it is made of; none: the base."""
        return self.parents if self.parent is None else (self.parent,)
