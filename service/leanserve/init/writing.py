"""From a model's name to a commented config file that can be served at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, cast

import jinja2
import yaml
from pydantic import ValidationError

from leanserve.bases.description import Evidence
from leanserve.bases.loaded import LoadedBase
from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.bases.shipped import SHIPPED
from leanserve.config.schema import read_config
from leanserve.config.variant_section import MAX_BATCH_DEPENDENCE
from leanserve.contracts import CLASS_MAPS, CLASSES, Json, Meaning, ModelSpec, OnnxModel, Share
from leanserve.disk import open_regular
from leanserve.errors import ConfigError
from leanserve.hardware import this_hardware, thread_budget
from leanserve.init.data_argument import SYNTHETIC, ToldColumns, data_section
from leanserve.init.model_argument import Hints, base_section
from leanserve.init.profile import ModelProfile, inspect, likely_state
from leanserve.init.rehearsal import LeftOut, rehearsed
from leanserve.init.suggestions import Suggestion, suggest

TODO = "# TODO:"
KEYS: Mapping[str, str] = {
    "image": "{size: [224, 224], mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]} # TODO: as in training",
    "text": "{tokenizer: tokenizer.json} # TODO: the file of the model",
    "audio": "{rate: 16000, samples: 16000} # TODO: as in training",
    "inputs": "{NAME: {dtype: float32, shape: [SIZES OF ONE ROW]}} # TODO: one per input",
    "labels": "labels.txt # TODO: one class name per line",
    "outputs": "{NAME: logits} # TODO: what each means",
    "weights": "FILE # TODO: the checkpoint",
    "weights_key": "KEY # TODO: which weights of the file",
    "rows": "one # TODO: any, one_length or one",
}
"""How keys of `base` that an error may ask for are written."""
TEMPLATE = Path(__file__).parent / "config.yaml.j2"
AGREEMENT: Mapping[Meaning, float] = {
    **dict.fromkeys(CLASSES, 0.98),
    **dict.fromkeys(CLASS_MAPS, 0.95),
    "embedding": 0.99,
    "values": 0.95,
}
"""What a first gate asks of an output by its meaning; of several, the least."""
WHY: Mapping[Evidence, str] = {
    "declared": "as you say",
    "operator": "its last operator is one for that",
    "numbers": "a guess: on random rows its numbers look like that; check it",
    "name": "a guess by its name; check it",
    "labels": "it has as many numbers per row as there are labels, and nothing says that they are probabilities",
    "form": "what such a model gives",
    "none": "nothing says otherwise; if they are classes or an embedding, say so",
}


SAFELY = 0.25
"""Share of `MAX_BATCH_DEPENDENCE` up to which random rows may move each other: those of the user may do so more."""
MAX_DROP = 0.01
"""What a first gate allows of a score."""
DISAGREEMENT = 0.02
"""Share of rows on which a good variant and its base are not both right or both wrong: what 8 bits usually leave."""
GATE_ROWS = 769
"""`DISAGREEMENT * (1.96 / MAX_DROP) ** 2`: from here on the 95 % interval of no loss at all ends within `MAX_DROP`."""


class Written(NamedTuple):
    """What was seen of a model, what was suggested for it, and what was guessed: the config says all of it, too."""

    profile: ModelProfile
    suggestions: tuple[Suggestion, ...]
    left: tuple[LeftOut, ...]
    remarks: tuple[str, ...]


def write_config(
    model: str,
    path: Path,
    hints: Hints,
    data: Path | None,
    columns: ToldColumns = ToldColumns(),  # noqa: B008
) -> Written:
    """Look at a model and write a config for it.

    Raises:
        ConfigError: the model cannot be opened, or does not fit the data; the text names what to add. Where the
            argument names a model, a file with `TODO` lines is written nevertheless.
    """
    folder = path.resolve().parent
    section = base_section(model, hints, folder)
    own = data is None and has_own_rows(section)
    rows = None if own else SYNTHETIC
    _origin(section, rows, folder)
    try:
        base, opened = _kept_apart(*_open_apart(section, rows, folder), rows, folder)
    except ConfigError as error:
        path.write_text(_unfinished(path, section, str(error)), encoding="utf-8")
        raise ConfigError(f"{error}. {path} has a TODO for it; mend that, or give `leanserve init` more") from error
    if data is not None:
        try:
            rows = data_section(data, opened.spec, folder, columns)
            opened = _open(base, rows, folder)
            if _is_labelled(opened):
                rows = {**rows, "splits": {"gate": GATE_ROWS}}
                opened = _open(base, rows, folder)
        except ConfigError as error:
            _written(opened, {"base": base, "data": SYNTHETIC}, path, f"data: {error}")
            told = f"{error}. {path} has a TODO for it, and random rows; mend that, or give `leanserve init` more"
            raise ConfigError(told) from error
    return _written(opened, {"base": base, "data": rows}, path)


def _is_labelled(base: LoadedBase) -> bool:
    return next(base.data("gate", 2 * base.unit).batches(8)).labels is not None


def is_unfinished(path: Path) -> bool:
    """Whether a file was left with its first line to do by `leanserve init`, which may replace it."""
    try:
        with open_regular(path) as stream:
            return stream.readline(len(TODO) + 1).startswith(TODO.encode())
    except OSError:
        return False


def _written(opened: LoadedBase, sections: Sections, path: Path, todo: str | None = None) -> Written:
    """`todo`: what is missing, as the first line of the file."""
    base = sections["base"] or {}
    if "shipped" not in base:
        base = {**base, "outputs": {item.name: item.meaning for item in opened.outputs}}
        base |= {"state": state} if (state := likely_state(opened.spec)) else {}
    sections = {**sections, "base": base}
    profile = inspect(opened, next(iter(base)))
    labelled = _is_labelled(opened)
    trainable = sections["data"] != SYNTHETIC and profile.spec.rows == "any"
    suggestions, left = rehearsed(opened, suggest(profile, this_hardware(), trainable=trainable))
    remarks = _remarks(sections, profile)
    if labelled and (few := _too_few(len(opened.data("gate")) // opened.unit)):
        remarks["data"].append(few)
    text = "" if todo is None else f"{TODO} {' '.join(todo.split())}\n"
    text += _rendered(path, profile, Chosen(suggestions, left, remarks, labelled), sections)
    path.write_text(text, encoding="utf-8")
    read_config(path)
    return Written(profile, suggestions, left, (*remarks["base"], *remarks["data"]))


def _unfinished(path: Path, section: Mapping[str, Json], reason: str) -> str:
    """A config that says what is missing, with every key that could tell it."""
    asked = [f"  # {key}: {example}" for key, example in KEYS.items() if f"base.{key}" in reason]
    told = " ".join(reason.split())
    lines = (
        *(f"{TODO} {told}", f"# Written by `leanserve init`; then: leanserve check --config {path.name}", ""),
        *("base:", _block(section), *asked, ""),
        *("# TODO: rows like those it will be asked about; random ones are good for a look at speed.", "data:"),
        *(_block(SYNTHETIC), "", "variants:", "  - name: float", ""),
    )
    return "\n".join(lines)


def has_own_rows(base: Mapping[str, Json]) -> bool:
    """Whether it is a shipped base that comes with data."""
    return "shipped" in base and SHIPPED[base["shipped"]].has_data


def _open(base: Mapping[str, Json], data: Mapping[str, Json] | None, folder: Path) -> LoadedBase:
    return open_base(_origin(base, data, folder))


def _origin(base: Mapping[str, Json], data: Mapping[str, Json] | None, folder: Path) -> Origin:
    try:
        return Origin.model_validate({"base": base, "data": data, "folder": folder})
    except ValidationError as error:
        places = [".".join(str(part) for part in item["loc"] if "." not in str(part)) for item in error.errors()]
        told = zip(places, error.errors(), strict=True)
        raise ConfigError("; ".join(f"{place}: {item['msg']}" for place, item in told)) from error


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
        if "base.rows" not in str(error) and "onnx" not in base:
            raise
        for rows in ("one_length", "one"):
            with suppress(ConfigError):
                apart = {**base, "rows": rows}
                return apart, _open(apart, data, folder)
        raise


def _kept_apart(
    base: Mapping[str, Json], opened: LoadedBase, data: Mapping[str, Json] | None, folder: Path
) -> tuple[Mapping[str, Json], LoadedBase]:
    """With `rows` as far apart as a graph needs them that finds the scale of activations while it runs.

    A trial lets such a graph pass whose rows move each other a little, and the gate of what is served would not.
    """
    if not _scales_by_batch(opened):
        return base, opened
    for rows in ("one_length", "one"):
        if opened.spec.rows == "one" or _dependence(opened) <= MAX_BATCH_DEPENDENCE * SAFELY:
            break
        base = {**base, "rows": rows}
        opened = _open(base, data, folder)
    return base, opened


def _scales_by_batch(base: LoadedBase) -> bool:
    import onnx

    from leanserve.bases.sources.onnx_file import SCALED_BY_BATCH
    from leanserve.bases.sources.onnx_reading import nodes_of

    model = base.model()
    if model.format != OnnxModel.format:
        return False
    graph = onnx.load(cast("OnnxModel", model).path).graph
    return any(node.op_type.startswith(SCALED_BY_BATCH) for node in nodes_of(graph))


def _dependence(base: LoadedBase) -> float:
    from leanserve.evaluation.batch_dependence import COMPANY, batch_dependence
    from leanserve.runtime.formats import open_backend

    backend = open_backend(base.model(), Share(thread_budget()))
    try:
        return batch_dependence(backend, base.spec, next(base.data("gate", 8).batches(8)).inputs, COMPANY)
    finally:
        backend.close()


Sections = Mapping[str, Mapping[str, Json] | None]


class Chosen(NamedTuple):
    """What stands in the file besides the sections of the model and its data."""

    suggestions: tuple[Suggestion, ...]
    left: tuple[LeftOut, ...]
    remarks: Mapping[str, list[str]]
    labelled: bool


def _rendered(path: Path, profile: ModelProfile, chosen: Chosen, sections: Sections) -> str:
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    return template.render(
        profile=profile,
        file=path.name,
        parameters=_short(profile.parameters),
        sections=[(name, _block(section)) for name, section in sections.items() if section is not None],
        remarks=chosen.remarks,
        labelled=chosen.labelled,
        max_drop=MAX_DROP,
        agreement=min(AGREEMENT[item.meaning] for item in profile.spec.outputs),
        meaning=_measured_by(profile.spec),
        suggestions=[(one, [_flow(step) for step in one.passes]) for one in chosen.suggestions],
        left=chosen.left,
    )


def _measured_by(spec: ModelSpec) -> str:
    """What the agreement of this model's outputs is."""
    words = {
        **dict.fromkeys(CLASSES, "the share of answers equal to the base's"),
        **dict.fromkeys(CLASS_MAPS, "the share of places with the base's class, where it has the class hit least"),
        "embedding": "the mean cosine to the base's embeddings",
        "values": "1 - the error of the worst channel, relative to its spread",
    }
    return "least of every output: " + ", or ".join(dict.fromkeys(words[item.meaning] for item in spec.outputs))


def _remarks(sections: Sections, profile: ModelProfile) -> dict[str, list[str]]:
    """Per section, what to check or to replace before a result is believed."""
    base, data = (sections[name] or {} for name in ("base", "data"))
    found: dict[str, list[str]] = {"base": [], "data": []}
    if "image" in base:
        found["base"].append(_guessed(base["image"]))
    if "outputs" in base:
        found["base"] += [f"Output {item.name}: {item.meaning}, {WHY[item.evidence]}." for item in profile.tensors]
    if "state" in base:
        found["base"].append("State is a guess by names and sizes; it matters to clients that use sequences alone.")
    if "rows" in base:
        found["base"].append(
            "The model lets rows of a batch change each other, so `rows` keeps them apart; see the docs."
        )
    if base.get("weights") == "random":
        found["base"].append("Random weights: good for speed work only. Give a file, or `hub`.")
    if data == SYNTHETIC:
        found["data"] += [
            "Random rows, good for a first look at speed; before you believe quality, put your own data here: "
            "{images: FOLDER}, {arrays: FILE.npz, labels: NAME}, {table: FILE.csv, label: COLUMN} or {texts: FILE.csv, "
            "text: COLUMN, label: COLUMN}.",
        ]
    return found


def _too_few(rows: int) -> str:
    """A warning where there are too few rows to decide what the gate asks; else empty."""
    if rows >= GATE_ROWS:
        return ""
    least = 100 * 1.96 * math.sqrt(DISAGREEMENT / max(1, rows))
    return (
        f"The gate split has {rows} rows: a loss below some {least:.1f} points cannot be told from chance, and "
        f"variants may stay undecided; {GATE_ROWS} rows decide {100 * MAX_DROP:g}."
    )


def _guessed(image: Mapping[str, Json]) -> str:
    """Of an image's preprocessing nothing but its size was told."""
    told = (
        f"mean {image['mean']} and std {image['std']} are a guess" if "mean" in image else "This is all that was told"
    )
    return f"{told}: like fit and resize, they must be those of the training."


def _block(section: Mapping[str, Json]) -> str:
    return "\n".join(f"  {key}: {_flow(value)}" for key, value in section.items())


def _flow(value: Json) -> str:
    """On one line."""
    text: str = yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _short(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
