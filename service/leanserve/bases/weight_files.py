"""Files with weights, read without running anybody's code.

safetensors holds tensors and nothing else. torch's own format is a pickle: torch's restricted unpickler reads it, which
knows tensors and plain containers. Training scripts keep more beside the weights (their arguments, the best accuracy
as a number of numpy, a configuration); of the usual types nothing is read. Any other type is refused by its name.

Large checkpoints are cut into shards, with an index that says which file has which tensor, or numbered by their names.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from leanserve.errors import ConfigError

REFUSED = {".pkl": "a pickle", ".pickle": "a pickle", ".joblib": "a pickle", ".npy": "a bare array", ".h5": "Keras"}
POINTER = b"version https://git-lfs"
"""Begins the file that git leaves in place of a large one that was not fetched."""
SAVE = "Where it was made, save the weights alone: safetensors.torch.save_model(model, FILE)"

INDEX = ".index.json"
NUMBERED = re.compile(r"(?P<start>.+-)\d+-of-(?P<total>\d+)(?P<ending>\.\w+)")
"""How the shards of a checkpoint are called."""
UNREAD = (
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "frozenset", "int", "list", "range", "slice")),
    *("builtins.str", "builtins.tuple", "typing.Any", "argparse.Namespace", "types.SimpleNamespace"),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath")),
    *("pathlib._local.PosixPath", "pathlib._local.WindowsPath", "torch.torch_version.TorchVersion"),
    *("numpy.dtype", "numpy.ndarray", "numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct"),
    *("numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct"),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata"),
    *(f"omegaconf.nodes.{name}Node" for name in ("Any", "Boolean", "Bytes", "Float", "Integer", "Path", "String")),
)
"""Types of what training scripts keep beside the weights; an `Unread` stands for each."""


class Unread:
    """Stands in a checkpoint for an object that is no weight: takes whatever it was made of and keeps nothing."""

    def __new__(cls, *_: object) -> Unread:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def shards_of(path: Path) -> tuple[Path, ...]:
    """The files that hold the weights which a path names: itself, those of an index or of a folder, numbered ones.

    Raises:
        ConfigError: one is missing, or it cannot be told which they are.
    """
    if path.is_dir():
        path = _of_folder(path)
    if path.name.endswith(INDEX):
        files = tuple(path.parent / name for name in _indexed(path))
    elif found := NUMBERED.fullmatch(path.name):
        start, total, ending = found["start"], found["total"], found["ending"]
        numbers = range(1, int(total) + 1)
        files = tuple(path.with_name(f"{start}{number:0{len(total)}}-of-{total}{ending}") for number in numbers)
    else:
        return (path,)
    if missing := [file.name for file in files if not file.is_file()]:
        raise ConfigError(
            f"base.weights: {path} is cut into {len(files)} files, of which {missing[0]} is not beside it"
        )
    return files


def _of_folder(folder: Path) -> Path:
    """The index or the only file with weights in a folder, safetensors first."""
    if any(folder.glob("*.distcp")):
        raise ConfigError(
            f"base.weights: {folder} is a distributed checkpoint; make one file of it: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} FILE.pt"
        )
    for pattern in (f"*.safetensors{INDEX}", f"*{INDEX}", "*.safetensors", "*.bin", "*.pt", "*.pth"):
        found = sorted(folder.glob(pattern))
        if len({NUMBERED.sub(r"\g<start>", file.name) for file in found}) == 1:
            return found[0]
        if found:
            break
    names = ", ".join(sorted(file.name for file in folder.iterdir())[:4])
    raise ConfigError(
        f"base.weights: {folder} has no index and not exactly one file with weights ({names}); name the file"
    )


def _indexed(path: Path) -> list[str]:
    """The names of the files in an index; they lie beside it."""
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"base.weights: {path} is no index of weights: {error}") from error
    if outside := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ConfigError(f"base.weights: {path} names {outside[0]!r}, which does not lie beside it")
    return names


def read_weights(path: Path) -> Mapping[Any, Any]:
    """What a file with weights holds, or all shards of one together: tensors by name, in torch's format perhaps in
    mappings within mappings.

    Raises:
        ConfigError: a file is missing, damaged, of a refused format, or has more in it than can be read without running
            code; or it cannot be told which the files are.
    """
    first, *others = map(read_file, shards_of(path))
    return _joined(first, others) if others else first


def _joined(first: Mapping[Any, Any], others: Iterable[Mapping[Any, Any]]) -> dict[Any, Any]:
    """Of mappings within mappings, those of the same name become one."""
    joined = dict(first)
    for content in others:
        for key, value in content.items():
            both = isinstance(value, Mapping) and isinstance(joined.get(key), Mapping)
            joined[key] = _joined(joined[key], [value]) if both else value
    return joined


def read_file(path: Path) -> Mapping[Any, Any]:
    """What one file holds; as `read_weights`."""
    if not path.is_file():
        raise ConfigError(f"base.weights: there is no file {path}")
    if path.suffix in REFUSED:
        raise ConfigError(
            f"base.weights: {path} is {REFUSED[path.suffix]}, which is not read: loading one can run any code. {SAVE}"
        )
    with path.open("rb") as stream:
        if stream.read(len(POINTER)) == POINTER:
            raise ConfigError(f"base.weights: {path} is a pointer of Git LFS, not the file itself; run git lfs pull")
    content = _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
    if not isinstance(content, Mapping):
        raise ConfigError(f"base.weights: {path} holds a {type(content).__name__}, not a state dict. {SAVE}")
    return content


def _safetensors(path: Path) -> Mapping[Any, Any]:
    """The tensors; those that `save_model` left out, because they are others once more, under both names again."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - it is no mapping
            same = stream.metadata() or {}
    except SafetensorError as error:
        raise ConfigError(f"base.weights: {path} is not a safetensors file: {error}") from error
    return tensors | {name: tensors[kept] for name, kept in same.items() if kept in tensors and name not in tensors}


def _torch_file(path: Path) -> Any:
    import torch

    if is_torchscript(path):
        raise ConfigError(
            f"base.weights: {path} is a TorchScript archive, which holds code. Save its weights alone: "
            "safetensors.torch.save_file(torch.jit.load(FILE).state_dict(), OTHER)"
        )
    with torch.serialization.safe_globals(_harmless()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)  # told below
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ConfigError(f"base.weights: {path} is not read: {_reason(path, error)}. {SAVE}") from error
        except Exception as error:  # damaged files fail in many ways
            lines = str(error).splitlines() or [type(error).__name__]
            raise ConfigError(f"base.weights: {path} is not a checkpoint of torch: {lines[0]}") from error


def is_torchscript(path: Path) -> bool:
    """Whether it is a program of TorchScript, with its weights."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _harmless() -> list[Any]:
    """What the unpickler may call for which name, besides what torch allows."""
    return [*((Unread, name) for name in UNREAD), (_mapping, "collections.defaultdict")]


def _mapping(*_: object) -> dict[Any, Any]:
    """For a `defaultdict`, whose content is read without its factory."""
    return {}


def _reason(path: Path, error: pickle.UnpicklingError) -> str:
    """Why the unpickler stopped: for types in the file that it does not know, or else for the way it was pickled."""
    import torch

    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (pickle.UnpicklingError, ValueError):  # the format before torch 1.6, or another protocol
        names = re.findall(r"GLOBAL (\S+)", str(error))[:1]
    if names:
        return f"it holds more than tensors, and loading that could run any code ({', '.join(sorted(names))})"
    return "only the usual format of torch.save (pickle protocol 2) can be read without running code"
