"""The key `device`: what variants compute on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, Field

_Gpu: TypeAlias = Annotated[str, Field(pattern=r"^cuda:(0|[1-9][0-9]?)$")]


def _each_once(names: Sequence[str]) -> Sequence[str]:
    if len(set(names)) < len(names):
        raise ValueError("every GPU is named once; more batches at a time on one are `lanes`")
    return names


DeviceChoice: TypeAlias = (
    Annotated[str, Field(pattern=r"^(auto|cpu|cuda|cuda:(0|[1-9][0-9]?))$")]
    | Annotated[tuple[_Gpu, ...], Field(min_length=1), AfterValidator(_each_once)]
)
"""`auto`, `cpu`, `cuda` (the first GPU), `cuda:N`, or a list of GPUs of which each has all variants."""
