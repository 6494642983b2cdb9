"""What every part of the config file has in common: frozen, and unknown keys are errors."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", value):
        raise ValueError("a name is 1-63 letters, digits, '.', '_' or '-', and starts with a letter or digit")
    return value


Name = Annotated[str, AfterValidator(_name)]
"""Names stand in URLs, headers, metric labels and file names."""


class Section(BaseModel):
    """A part of the config file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
