"""The sections `experiment` and `hardware`: how a candidate is judged on live traffic, and what the machine costs."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from leanserve.config.section import Section
from leanserve.experiments.ramp import RampPolicy
from leanserve.experiments.verdict import Limits

MIB = 2**20


class ExperimentConfig(Section):
    """What an experiment starts with where its start says nothing else."""

    shadow_share: float = Field(
        1.0, ge=0, le=1, description="share of the base's batches that are answered again; 0: judge by users' requests"
    )
    shadow_time: float = Field(
        0.005, gt=0, le=1, description="most of the device's time for that; it is idle time in any case"
    )
    shadow_rows: int = Field(256, ge=1, le=10**6, description="rows that may wait to be answered again")
    shadow_mb: int = Field(64, ge=1, le=2**20, description="MB that they may take meanwhile, answers included")
    min_cosine: float = Field(0.99, gt=-1, le=1, description="from where on two embeddings agree")
    min_places: float = Field(
        0.98, ge=0, le=1, description="share of places with the same best class from where on two maps of classes agree"
    )
    max_error: float = Field(
        0.05, ge=0, description="up to where two values agree, relative to the largest of the base's row"
    )
    keep_payloads: bool = Field(
        default=False, description="keep the inputs of rows that are answered differently, in memory, to be looked at"
    )
    payload_mb: int = Field(16, ge=1, le=2**14, description="MB of them in all, the newest")
    limits: Limits = Limits()
    ramp: RampPolicy = RampPolicy()
    store: Path | None = Field(None, description="SQLite file of the state; by default in the cache folder")


class HardwareConfig(Section):
    """What the machine costs."""

    price_per_hour: float | None = Field(None, gt=0, le=1e9, description="of the whole machine, in the currency")
    currency: str = Field("USD", min_length=1, max_length=8, description="shown beside prices")
