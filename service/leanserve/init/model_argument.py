"""What a person types to name a model, as the config's `base:` section."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from leanserve.bases.shipped import SHIPPED
from leanserve.bases.weight_files import is_torchscript
from leanserve.contracts import Json, Meaning
from leanserve.errors import ConfigError

FORMS = (
    "a shipped base ({shipped}), timm:NAME, transformers:NAME, a folder written by save_pretrained, FILE.onnx, "
    "FILE.pt2, or package.module:factory for a torch module of your own"
)
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
GREY = {"mode": "L", "mean": [0.5], "std": [0.5]}


@dataclass(frozen=True)
class Hints:
    """What a person may tell besides the model."""

    weights: str | None = None
    weights_key: str | None = None
    task: str | None = None
    labels: Path | None = None
    image: str | None = None
    """`WIDTHxHEIGHT`, with `xL` behind it for grey images."""
    tokenizer: Path | None = None
    shapes: tuple[str, ...] = ()
    """`NAME=3,224,224`, `?` for an axis of any size; one per input."""
    arguments: tuple[str, ...] = ()
    """`NAME=VALUE`, per argument of a factory; a value that is no JSON is a text."""
    meanings: tuple[str, ...] = ()
    """`NAME=MEANING`, per output of which it cannot be seen."""


def base_section(model: str, hints: Hints, folder: Path) -> dict[str, Json]:
    """The `base:` section; paths in it are relative to `folder`, where the config will be.

    Raises:
        ConfigError: the argument names no model; the text lists the forms.
    """
    section = _form(model, folder)
    if hints.weights is not None:
        section["weights"] = hints.weights if hints.weights in {"hub", "random"} else _near(hints.weights, folder)
    section |= {key: value for key in ("weights_key", "task") if (value := getattr(hints, key)) is not None}
    if hints.labels is not None:
        section["labels"] = _near(hints.labels, folder)
    if hints.image is not None:
        section["image"] = _image(hints.image)
    if hints.tokenizer is not None:
        section["text"] = {"tokenizer": _near(hints.tokenizer, folder)}
    if hints.shapes:
        section["inputs"] = dict(_input(text) for text in hints.shapes)
    if hints.arguments:
        section["arguments"] = dict(_argument(text) for text in hints.arguments)
    if hints.meanings:
        section["outputs"] = dict(_output(text) for text in hints.meanings)
    return section


def _form(model: str, folder: Path) -> dict[str, Json]:
    if model in SHIPPED:
        return {"shipped": model}
    for form in ("timm", "transformers"):
        if model.startswith(f"{form}:") and model != f"{form}:":
            name = model.removeprefix(f"{form}:")
            return {form: _near(name, folder) if Path(name).is_dir() else name}
    path = Path(model)
    if path.suffix in {".onnx", ".pt2"}:
        if not path.is_file():
            raise ConfigError(f"there is no file {path}")
        return {"onnx" if path.suffix == ".onnx" else "torch_export": _near(path, folder)}
    if (path / "config.json").is_file():
        return {"transformers": _near(path, folder)}
    if path.is_file() and is_torchscript(path):
        raise ConfigError(
            f"{path} is a TorchScript program, which holds code and is not run. Export it once, where it was made, and "
            "bring the result: torch.onnx.export(torch.jit.load(FILE).eval(), (EXAMPLE,), 'model.onnx', dynamo=False, "
            "input_names=['x'], dynamic_axes={'x': {0: 'rows'}}); or bring its class as package.module:factory with "
            "--weights, from torch.jit.load(FILE).state_dict()"
        )
    if path.is_file():
        raise ConfigError(
            f"{path} has weights at most, no architecture: name the model (timm:NAME, or package.module:factory) and "
            f"give this file as --weights {path}"
        )
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", model):
        return {"python": model}
    raise ConfigError(f"'{model}' names no model; give {FORMS.format(shipped=', '.join(sorted(SHIPPED)))}")


def _near(path: str | Path, folder: Path) -> str:
    return os.path.relpath(path, folder)


def _image(text: str) -> Mapping[str, Json]:
    found = re.fullmatch(r"(\d+)x(\d+)(xL)?", text)
    if found is None:
        raise ConfigError(f"--image {text}: give WIDTHxHEIGHT, such as 224x224, or 28x28xL for grey images")
    size = {"size": [int(found[1]), int(found[2])]}
    return size | (GREY if found[3] else IMAGENET)


def _input(text: str) -> tuple[str, Mapping[str, Json]]:
    found = re.fullmatch(r"(\w+)(?::(\w+))?=((?:\d+|\?)(?:,(?:\d+|\?))*)", text)
    if found is None:
        raise ConfigError(f"--input {text}: give NAME=SIZES or NAME:DTYPE=SIZES, such as x=3,224 or ids:int64=?")
    shape = [None if size == "?" else int(size) for size in found[3].split(",")]
    return found[1], {"dtype": found[2] or "float32", "shape": shape}


def _argument(text: str) -> tuple[str, Json]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError(f"--argument {text}: give NAME=VALUE, such as depth=18 or pretrained=false")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _output(text: str) -> tuple[str, str]:
    name, _, meaning = text.rpartition("=")
    if not name or meaning not in get_args(Meaning):
        raise ConfigError(f"--meaning {text}: give NAME=MEANING, one of {', '.join(get_args(Meaning))}")
    return name, meaning
