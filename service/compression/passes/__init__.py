"""Every pass, written out by hand: `AnyPass` is the discriminated union that the config validates, `ALL` its members."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from service.compression.passes.base import Pass

AnyPass = Annotated[
    Pass,
    Field(discriminator="kind"),
]

ALL: tuple[type[Pass], ...] = get_args(get_args(AnyPass)[0])
