"""From pydantic's errors to lines on which a person can act: `file:line: key: what is wrong, what would be right`."""

from __future__ import annotations

import difflib
import re
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from service.bases.data_declaration import DATA_FORMS
from service.bases.declaration import FORMS as BASE_FORMS
from service.bases.declaration import IMAGE_FORMS
from service.compression.passes import ALL
from service.compression.passes.base import Pass
from service.yaml_source import YamlSource


def describe(source: YamlSource, item: ErrorDetails, root: type[BaseModel]) -> str:
    """One problem as one line. `root` is the model of the whole file, needed to tell the keys known at a place."""
    # The tag of a union member is part of pydantic's location, but not of the file.
    location = tuple(step for step in item["loc"] if step not in KINDS and not _is_form(step))
    steps = (*location, *_steps_in(item["msg"]))
    where = ".".join(str(step) for step in location)
    return f"{source.place(steps)}: {where + ': ' if where else ''}{_text(item, steps, root)}"


def _text(item: ErrorDetails, steps: tuple[str | int, ...], root: type[BaseModel]) -> str:
    if item["type"] == "extra_forbidden":
        return f"unknown key '{steps[-1]}'{_near(str(steps[-1]), _keys_at(item['loc'][:-1], root), 'known keys are')}"
    if item["type"] == "missing":
        return f"the key '{steps[-1]}' is missing"
    if item["type"] == "union_tag_invalid":
        wrong = str(item["ctx"]["tag"])
        return f"unknown pass '{wrong}'{_near(wrong, list(KINDS), 'passes are')}"
    if item["type"] in {"base_form", "data_form"}:
        return item["msg"]
    if item["type"] in {"union_tag_not_found", "model_attributes_type"}:
        return f"a pass is written {{kind: NAME, option: value}}; passes are {', '.join(KINDS)}"
    text = item["msg"].removeprefix("Value error, ")
    given = item["input"]
    return f"{text} (got {given!r})" if steps and not isinstance(given, (dict, list)) else text


def _is_form(step: str | int) -> bool:
    """Tags of the forms of `base` and `data` look like `base.timm`."""
    return isinstance(step, str) and step.startswith(("base.", "data."))


def _near(wrong: str, known: list[str], otherwise: str) -> str:
    near = difflib.get_close_matches(wrong, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; {otherwise} {', '.join(sorted(known))}"


def _steps_in(message: str) -> tuple[str | int, ...]:
    """Validators of a whole section cannot give a location; their texts name it in a fixed form."""
    if found := re.match(r"Value error, variants\[(\d+)\]\.passes\[(\d+)\]", message):
        return ("variants", int(found[1]), "passes", int(found[2]))
    if found := re.match(r"Value error, variants\[(\d+)\]", message):
        return ("variants", int(found[1]), "name")
    if found := re.match(r"Value error, traffic\.weights(?: names '([^']+)')?", message):
        return ("traffic", "weights", *found.groups(""))
    if message.startswith("Value error, threads"):
        return ("threads",)
    return ()


def _keys_at(location: tuple[str | int, ...], root: type[BaseModel]) -> list[str]:
    """Keys of the section at a location, found by walking the models' fields."""
    section = root
    for step in location:
        if _is_form(step):
            section = FORMS[str(step)]
        elif step in KINDS:
            section = KINDS[str(step)]
        elif isinstance(step, str) and step in section.model_fields:
            section = _model_in(section.model_fields[step].annotation) or section
    return list(section.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_in(part))), None)


def kind_of(pass_: type[Pass]) -> str:
    """The name of a pass in the config."""
    return str(get_args(pass_.model_fields["kind"].annotation)[0])


FORMS: dict[str, type[BaseModel]] = {
    **{f"base.{form.kind}": form for form in BASE_FORMS},
    **{f"data.{form.kind}": form for form in DATA_FORMS},
    **IMAGE_FORMS,
}
KINDS: dict[str, type[Pass]] = {kind_of(pass_): pass_ for pass_ in ALL}
