"""What every part of the config file has in common: frozen, and unknown keys are errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", value):
        raise ValueError("a name is 1-63 letters, digits, '.', '_' or '-', and starts with a letter or digit")
    return value


Name = Annotated[str, AfterValidator(_name)]
"""Names stand in URLs, headers, metric labels and file names."""


class Section(BaseModel):
    """A part of the config file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Form(Section):
    """One of several ways to write a section; a key that the others lack tells which: the one named `kind`."""

    kind: ClassVar[str]


def told_by_key(section: str, forms: tuple[type[Form], ...], meaning: str) -> Discriminator:
    """Chooses among `forms`, each tagged `section.kind`; `meaning` begins the error where none of the keys is there."""

    def form(value: Any) -> str | None:
        if isinstance(value, Mapping):
            return next((f"{section}.{form.kind}" for form in forms if form.kind in value), None)
        return f"{section}.{value.kind}" if isinstance(value, forms) else None

    return Discriminator(
        form,
        custom_error_type=f"{section}_form",
        custom_error_message=f"{meaning} a mapping with one of the keys {', '.join(form.kind for form in forms)}",
    )


def short_for(key: str) -> BeforeValidator:
    """A string alone stands for a mapping with that one key."""
    return BeforeValidator(lambda value: {key: value} if isinstance(value, str) else value)
