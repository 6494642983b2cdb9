"""From a model's name to a commented config file that can be served at once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import jinja2
import yaml
from pydantic import ValidationError

from leanserve.bases.description import Evidence
from leanserve.bases.loaded import LoadedBase
from leanserve.bases.opening import Origin, open_base
from leanserve.bases.shipped import SHIPPED
from leanserve.config.schema import read_config
from leanserve.contracts import CLASSES, Json, Meaning, ModelSpec
from leanserve.errors import ConfigError
from leanserve.hardware import isa_flags
from leanserve.init.data_argument import SYNTHETIC, data_section
from leanserve.init.model_argument import Hints, base_section
from leanserve.init.profile import ModelProfile, inspect
from leanserve.init.suggestions import Suggestion, suggest

TEMPLATE = Path(__file__).parent / "config.yaml.j2"
AGREEMENT: Mapping[Meaning, float] = dict.fromkeys(CLASSES, 0.98) | {"embedding": 0.99, "values": 0.95}
"""What a first gate asks of an output by its meaning; of several, the least."""
WHY: Mapping[Evidence, str] = {
    "declared": "as you say",
    "operator": "its last operator is one for that",
    "numbers": "a guess: on random rows its numbers profile like that; check it",
    "name": "a guess by its name; check it",
    "labels": "it has as many numbers per row as there are labels, and nothing says that they are probabilities",
    "form": "what such a model gives",
    "none": "nothing says otherwise; if they are classes or an embedding, say so",
}


def write_config(
    model: str, path: Path, hints: Hints, data: Path | None
) -> tuple[ModelProfile, tuple[Suggestion, ...]]:
    """ModelProfile at a model and write a config for it; also what was seen and suggested.

    Raises:
        ConfigError: the model cannot be opened, or does not fit the data; the text names what to add.
    """
    folder = path.resolve().parent
    section = base_section(model, hints, folder)
    own = data is None and has_own_rows(section)
    base, opened = _open_apart(section, None if own else SYNTHETIC, folder)
    rows = None if own else data_section(data, opened.spec, folder)
    if data is not None:
        opened = _open(base, rows, folder)
    if "shipped" not in base:
        base = {**base, "outputs": {item.name: item.meaning for item in opened.outputs}}
    profile = inspect(opened, next(iter(base)))
    labelled = next(opened.data("gate", 2 * opened.unit).batches(8)).labels is not None
    suggestions = suggest(profile, isa_flags(), trainable=rows != SYNTHETIC and profile.spec.rows == "any")
    text = _rendered(path, profile, suggestions, {"base": base, "data": rows}, labelled=labelled)
    path.write_text(text, encoding="utf-8")
    read_config(path)
    return profile, suggestions


def has_own_rows(base: Mapping[str, Json]) -> bool:
    """Whether it is a shipped base that comes with data."""
    return "shipped" in base and SHIPPED[base["shipped"]].has_data


def _open(base: Mapping[str, Json], data: Mapping[str, Json] | None, folder: Path) -> LoadedBase:
    try:
        origin = Origin.model_validate({"base": base, "data": data, "folder": folder})
    except ValidationError as error:
        places = [".".join(str(part) for part in item["loc"] if "." not in str(part)) for item in error.errors()]
        told = zip(places, error.errors(), strict=True)
        raise ConfigError("; ".join(f"{place}: {item['msg']}" for place, item in told)) from error
    return open_base(origin)


def _open_apart(
    base: Mapping[str, Json], data: Mapping[str, Json] | None, folder: Path
) -> tuple[Mapping[str, Json], LoadedBase]:
    """The base, and its section with `rows` as far apart as the model needs them.

    Raises:
        ConfigError: it cannot be opened, however its rows share batches.
    """
    try:
        return base, _open(base, data, folder)
    except ConfigError as error:
        if "base.rows" not in str(error):
            raise
        for rows in ("one_length", "one"):
            with suppress(ConfigError):
                apart = {**base, "rows": rows}
                return apart, _open(apart, data, folder)
        raise


Sections = Mapping[str, Mapping[str, Json] | None]


def _rendered(
    path: Path, profile: ModelProfile, suggestions: tuple[Suggestion, ...], sections: Sections, *, labelled: bool
) -> str:
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(
        profile=profile,
        file=path.name,
        parameters=_short(profile.parameters),
        sections=[(name, _block(section)) for name, section in sections.items() if section is not None],
        remarks=_remarks(sections, profile),
        labelled=labelled,
        agreement=min(AGREEMENT[item.meaning] for item in profile.spec.outputs),
        meaning=_measured_by(profile.spec),
        suggestions=[(suggestion, [_flow(step) for step in suggestion.passes]) for suggestion in suggestions],
    )


def _measured_by(spec: ModelSpec) -> str:
    """What the agreement of this model's outputs is."""
    words = {
        **dict.fromkeys(CLASSES, "the share of answers equal to the base's"),
        "embedding": "the mean cosine to the base's embeddings",
        "values": "1 - the error of the worst channel, relative to its spread",
    }
    return "least of every output: " + ", or ".join(dict.fromkeys(words[item.meaning] for item in spec.outputs))


def _remarks(sections: Sections, profile: ModelProfile) -> dict[str, list[str]]:
    """Per section, what to check or to replace before a result is believed."""
    base, data = (sections[name] or {} for name in ("base", "data"))
    found: dict[str, list[str]] = {"base": [], "data": []}
    if "image" in base:
        found["base"].append("Check mean, std, fit and resize: they must be those of the training.")
    if "outputs" in base:
        found["base"] += [f"Output {item.name}: {item.meaning}, {WHY[item.evidence]}." for item in profile.tensors]
    if "rows" in base:
        found["base"].append(
            "The model lets rows of a batch change each other, so `rows` keeps them apart; see the docs."
        )
    if base.get("weights") == "random":
        found["base"].append("Random weights: good for speed work only. Give a file, or `hub`.")
    if data == SYNTHETIC:
        found["data"] += [
            "Random rows, good for a first profile at speed. Put your own data here before you believe quality:",
            "{images: FOLDER}, {arrays: FILE.npz, labels: NAME} or {texts: FILE.csv, text: COLUMN, label: COLUMN}.",
        ]
    return found


def _block(section: Mapping[str, Json]) -> str:
    return "\n".join(f"  {key}: {_flow(value)}" for key, value in section.items())


def _flow(value: Json) -> str:
    """On one line."""
    text: str = yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _short(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
