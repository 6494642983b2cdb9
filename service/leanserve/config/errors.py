"""From pydantic's errors to lines on which a person can act: `file:line: key: what is wrong, what would be right`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from leanserve.codecs.postprocess import STEPS
from leanserve.config.base_section import FORMS as BASE_FORMS
from leanserve.config.base_section import IMAGE_FORMS
from leanserve.config.data_section import DATA_FORMS
from leanserve.config.score_section import SCORE_FORMS
from leanserve.config.yaml import PathStep, YamlSource
from leanserve.passes import ALL
from leanserve.passes.base import Pass

TYPES: Final = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "a text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "path_type": "a path",
}
"""What pydantic's types are called in a config file."""

SECRET: Final = frozenset({"sha256", "env"})
"""Keys of the file where somebody may have written a secret, which no error repeats."""


class _Problem(NamedTuple):
    """One of pydantic's errors, and the steps from the top of the file to what it is about."""

    item: ErrorDetails
    steps: tuple[PathStep, ...]

    @property
    def of_member(self) -> bool:
        """Whether it is what one member of a union, or a mapping's own key, says of the value at these steps."""
        return self.item["type"] not in {"missing", "extra_forbidden"} and self.item["loc"][-1:] != self.steps[-1:]


def describe(source: YamlSource, errors: Iterable[ErrorDetails], root: type[BaseModel]) -> list[str]:
    """One line per problem. `root` is the model of the whole file, needed to tell the keys known at a place."""
    problems = [_Problem(item, _steps(source.value, item)) for item in errors]
    together: dict[object, list[_Problem]] = {}
    for number, problem in enumerate(problems):
        if not _is_outdone(problem, problems):
            # What every member of a union says of one value is a single problem.
            together.setdefault(problem.steps if problem.of_member else number, []).append(problem)
    return [_line(source, said, root) for said in together.values()]


def _is_outdone(problem: _Problem, problems: Iterable[_Problem]) -> bool:
    """Whether others know better: a member of a union that got further into the value, or the entries of a list."""
    depth = len(problem.steps)
    return (problem.of_member or problem.item["type"] == "too_short") and any(
        len(other.steps) > depth and other.steps[:depth] == problem.steps for other in problems
    )


def _line(source: YamlSource, said: Sequence[_Problem], root: type[BaseModel]) -> str:
    item, steps = said[0]
    where = ".".join(str(step) for step in steps)
    place = source.place((*steps, *_steps_in(item["msg"])))
    text = _text(item, steps, root) if len(said) == 1 else _alternatives([problem.item for problem in said])
    return f"{place}: {where + ': ' if where else ''}{text}"


def _steps(value: Any, item: ErrorDetails) -> tuple[PathStep, ...]:
    """The part of pydantic's location that is in the file, which knows nothing of unions; and the key that is missing.

    Going by the file and not by names: a variant may have the name of a pass.
    """
    steps: list[PathStep] = []
    for step in item["loc"]:
        known = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        if step in known:
            value = value[step]
            steps.append(step)
    return (*steps, item["loc"][-1]) if item["type"] == "missing" else tuple(steps)


def _text(item: ErrorDetails, steps: tuple[PathStep, ...], root: type[BaseModel]) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind in {"base_form", "data_form", "score_form"}:
        return item["msg"]
    if kind == "model_type":
        return f"must be a mapping with the keys {', '.join(_keys_at(item['loc'], root))}{_got(item)}"
    if kind == "too_short":
        return f"must have at least {context['min_length']} entry"
    if special := _text_of_key(item, steps, root) or _text_of_kind(item):
        return special
    text = f"must be {TYPES[kind]}" if kind in TYPES else item["msg"].removeprefix("Value error, ")
    return text + _got(item) if steps else text


def _text_of_key(item: ErrorDetails, steps: tuple[PathStep, ...], root: type[BaseModel]) -> str | None:
    """Of a problem with a key and not with its value."""
    if item["type"] == "missing":
        return f"the key '{steps[-1]}' is missing"
    if item["type"] == "extra_forbidden":
        known = _keys_at(item["loc"][:-1], root)
    elif item["type"] == "literal_error" and item["loc"][-1] == "[key]":
        known = re.findall(r"'([^']+)'", item["ctx"]["expected"])
    else:
        return None
    return f"unknown key '{steps[-1]}'{_near(str(steps[-1]), known, 'known keys are')}"


def _text_of_kind(item: ErrorDetails) -> str | None:
    what, known = ("step", STEPS) if item["loc"][:1] == ("postprocess",) else ("pass", KINDS)
    plural = "steps" if what == "step" else "passes"
    if item["type"] == "union_tag_invalid":
        wrong = str(item["ctx"]["tag"])
        return f"unknown {what} '{wrong}'{_near(wrong, list(known), f'{plural} are')}"
    if item["type"] in {"union_tag_not_found", "model_attributes_type"}:
        return f"a {what} is written {{kind: NAME, option: value}}; {plural} are {', '.join(known)}"
    return None


def _alternatives(said: Sequence[ErrorDetails]) -> str:
    """What the value of a union may be."""
    wanted = dict.fromkeys(map(_wanted, said))
    return f"must be {' or '.join(wanted)}{_got(said[0])}"


def _wanted(item: ErrorDetails) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "greater_than_equal":
        return f"at least {context['ge']}"
    return TYPES.get(kind) or item["msg"].removeprefix("Input should be ")


def _got(item: ErrorDetails) -> str:
    told = not isinstance(item["input"], (dict, list)) and not SECRET & set(item["loc"])
    return "" if not told else f" (got {item['input']!r})"


def _is_form(step: PathStep) -> bool:
    """Tags of the forms of `base` and `data` look like `base.timm`."""
    return isinstance(step, str) and step.startswith(("base.", "data.", "score."))


def _near(wrong: str, known: list[str], otherwise: str) -> str:
    near = difflib.get_close_matches(wrong, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; {otherwise} {', '.join(sorted(known))}"


def _steps_in(message: str) -> tuple[PathStep, ...]:
    """Validators of a whole section cannot give a location; their texts name it in a fixed form or begin with a key."""
    if found := re.match(r"Value error, variants\[(\d+)\]\.passes\[(\d+)\]", message):
        return ("variants", int(found[1]), "passes", int(found[2]))
    if found := re.match(r"Value error, variants\[(\d+)\]\.(parents?)", message):
        return ("variants", int(found[1]), found[2])
    if found := re.match(r"Value error, variants\[(\d+)\]", message):
        return ("variants", int(found[1]), "name")
    if found := re.match(r"Value error, traffic\.weights(?: names '([^']+)')?", message):
        return ("traffic", "weights", *found.groups(""))
    return tuple(re.findall(r"^Value error, (\w+)", message))


def _keys_at(location: tuple[PathStep, ...], root: type[BaseModel]) -> list[str]:
    """Keys of the section at a location, found by walking the models' fields."""
    section = root
    for step in location:
        if _is_form(step):
            section = FORMS[str(step)]
        elif step in _TAGGED:
            section = _TAGGED[str(step)]
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
    **{f"score.{form.kind}": form for form in SCORE_FORMS},
    **IMAGE_FORMS,
}
KINDS: dict[str, type[Pass]] = {kind_of(pass_): pass_ for pass_ in ALL}
_TAGGED: Mapping[str, type[BaseModel]] = {**KINDS, **STEPS}
