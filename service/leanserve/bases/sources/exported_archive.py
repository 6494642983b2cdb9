"""A `.pt2` file as torch.export saves it, with nothing left in it that torch would run while reading it.

Torch warns to load such files from trusted sources only, and it is right: example inputs and odd tensors are pickles,
shapes and guards are evaluated as Python, operators are looked up by any name below `torch`, and a
file may bring compiled libraries. None of that is needed to run a model. So the file is read here as what it is, a zip
of JSON and raw tensors; what can be left out is left out, what must stay has to look as torch itself writes it, and
torch gets the copy.

What remains is the graph: it can run torch's numeric operators on its inputs, in the process that serves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from leanserve.contracts import Json
from leanserve.errors import ConfigError

PROGRAM = "models/model.json"
EXAMPLES = "data/sample_inputs/model.pt"
CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
KEPT = re.compile(r"archive_format|archive_version|byteorder|\.data/version|version|data/(weights|constants)/[\w.]+")

PLAIN = re.compile(r"[\w.+-]*")
OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!from_file\b|save\b)\w+\.\w+"
    r"|torch\.ops\.higher_order\.(cond|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|torch\.(_sym_sqrt|sym_(int|float|max|min|not|sum|ite))"
    r"|math\.(ceil|floor|trunc|sqrt)"
)
QUOTED = re.compile(r"'[\w.+-]*'")
SIZE = re.compile(r"L\['\w+'\](\[\d+\])*(\.size\(\)\[\d+\])?")
ARITHMETIC = re.compile(r"(\w|\d\.\d|[\s+*/%(),<>=!&|~-])*")
FUNCTIONS = frozenset(
    re.findall(
        r"\w+",
        "Symbol Integer Float Rational Add Mul Pow FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt "
        "FloorToInt CeilDiv LShift RShift PowByNatural FloatPow FloatTrueDiv IntTrueDiv TruncToFloat TruncToInt "
        "RoundToInt ToFloat Identity Max Min Equality Unequality LessThan StrictLessThan GreaterThan StrictGreaterThan "
        "And Or Not max min and or not",
    )
)
"""What a shape may be computed with, and a guard."""
TREE = re.compile(r'(?:(?!__)[\w \[\]{}":,.\\])*')
STACK = re.compile(r"[\w\s.,;@$\[\]()'<>-]*")


def safe_copy(path: Path) -> BytesIO:
    """The archive as torch may read it.

    Raises:
        ConfigError: missing, no such archive, or with parts that torch would run.
    """
    if not path.is_file():
        raise ConfigError(f"base.torch_export: there is no file {path}")
    try:
        with ZipFile(path) as archive:
            return _copied(archive, path)
    except (BadZipFile, ValueError, KeyError, OSError) as error:
        raise ConfigError(
            f"base.torch_export: {path} is not a program as torch.export.save writes it now ({error}); export it again "
            "with an installed torch of 2.11 or newer"
        ) from error


def _copied(archive: ZipFile, path: Path) -> BytesIO:
    root = archive.namelist()[0].partition("/")[0] if archive.namelist() else ""
    names = [name.removeprefix(f"{root}/") for name in archive.namelist()]
    if PROGRAM not in names or len(set(names)) < len(names):
        raise ValueError(f"no single {PROGRAM} in it")
    if native := next((name for name in names if name.startswith("data/aotinductor/")), None):
        raise _refused(path, f"compiled code ({native})")
    for config in CONFIGS:
        for pickled in _pickled(json.loads(archive.read(f"{root}/{config}"))):
            raise _refused(path, f"'{pickled}' as a pickle, not as a plain tensor")
    copy = BytesIO()
    with ZipFile(copy, "w") as clean:
        for name in filter(KEPT.fullmatch, names):
            clean.writestr(f"{root}/{name}", archive.read(f"{root}/{name}"))
        program = _program(json.loads(archive.read(f"{root}/{PROGRAM}")), path)
        clean.writestr(f"{root}/{PROGRAM}", json.dumps(program))
        clean.writestr(f"{root}/{EXAMPLES}", b"")
    copy.seek(0)
    return copy


def _pickled(config: Json) -> Iterator[str]:
    for name, stored in config["config"].items():
        if stored["use_pickle"] is not False or not str(stored["path_name"]).startswith(("weight_", "tensor_")):
            yield name


def _program(program: Json, path: Path) -> Json:
    """The program without remarks and traces of where it was made, everything else looked at."""
    kept = _without_remarks(program)
    _check(kept, "", path)
    return kept


def _without_remarks(value: Json) -> Json:
    if isinstance(value, list):
        return [_without_remarks(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _module_path(item) if key == "metadata" else _without_remarks(item) for key, item in value.items()}


def _module_path(metadata: Json) -> Json:
    """Of the remarks on a node the one that says in which layer it was; ONNX nodes are named after it."""
    stack = metadata.get("nn_module_stack")
    return {"nn_module_stack": stack} if isinstance(stack, str) and STACK.fullmatch(stack) else {}


def _check(value: Json, key: str, path: Path) -> None:
    """Every string must look as torch writes it under its key."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in {"metadata", "as_string", "as_strings"}:  # strings that torch only passes on
                _require(PLAIN.fullmatch(name) or _is_arithmetic(name), "the name", name, path)
                _check(item, name, path)
    elif isinstance(value, list):
        for item in value:
            _check(item, key, path)
    elif isinstance(value, str):
        if key in {"target", "as_operator"}:
            _require(OPERATOR.fullmatch(value), "the operator", value, path)
        elif key == "expr_str":
            _require(_is_arithmetic(QUOTED.sub("s", value)), "the shape", value, path)
        elif key == "guards_code":
            _require(_is_arithmetic(SIZE.sub("s", value)), "the guard", value, path)
        else:
            pattern = TREE if key in {"in_spec", "out_spec"} else PLAIN
            _require(pattern.fullmatch(value), f"under '{key}'", value, path)


def _is_arithmetic(text: str) -> bool:
    """Whether it computes with symbols and numbers alone: torch evaluates it as Python."""
    called = re.findall(r"(\w+)\s*\(", text)
    known = FUNCTIONS.issuperset(called) and not re.search(r"\)\s*\(|__", text)
    return known and ARITHMETIC.fullmatch(text) is not None


def _require(right: object, what: str, found: str, path: Path) -> None:
    if not right:
        raise _refused(path, f"{what} {found[:80]!r}")


def _refused(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"base.torch_export: {path} holds {what}, which is not read: torch could run any code with it. Export the "
        "model alone, as float32 tensors and torch's own operators, or bring its source as base.python"
    )
