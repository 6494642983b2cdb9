"""Weights that somebody brought, read without running anybody's code.

safetensors holds tensors and nothing else. Torch's own format is a pickle: it is read by torch's restricted unpickler
(`weights_only`), which knows tensors and plain containers; a file that needs more is refused, because loading it would
execute whatever its author wrote. Wrappers that training scripts put around a state dict are taken off.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.disk import sha256_of
from service.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "weights")
"""Keys under which training scripts put the state dict."""
PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and Lightning put before every name."""
REFUSED = {".pkl": "a pickle", ".pickle": "a pickle", ".joblib": "a pickle", ".npy": "a bare array", ".h5": "Keras"}
SHOWN = 4


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint, on the CPU.

    Raises:
        ConfigError: missing, damaged, of a refused format, or without tensors.
    """
    if not path.is_file():
        raise ConfigError(f"base.weights: there is no file {path}")
    if path.suffix in REFUSED:
        raise ConfigError(
            f"base.weights: {path} is {REFUSED[path.suffix]}, which is not read: loading one can run any code. "
            "Save the state dict with safetensors.torch.save_file"
        )
    found = _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
    return _unwrapped(found, path)


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a checkpoint into a module; every tensor must find its place, and every place its tensor.

    Raises:
        ConfigError: names or shapes differ; the text lists the first of each.
    """
    state = read_state(path)
    wanted = module.state_dict()
    for prefix in ("", *PREFIXES):
        candidate = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        if candidate.keys() == wanted.keys():
            state = candidate
            break
    problems = _differences(state, wanted)
    if problems:
        raise ConfigError(f"base.weights: {path} does not fit the model: {'; '.join(problems)}")
    module.load_state_dict(state)


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's content.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return sha256_of(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ConfigError(f"base.weights: {path} is not a safetensors file: {error}") from error


def _torch_file(path: Path) -> Any:
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"base.weights: {path} is not read: it holds more than tensors, and loading that could run any code "
            f"({str(error).splitlines()[0]}). Save the state dict alone, best with safetensors.torch.save_file"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ConfigError(f"base.weights: {path} is not a checkpoint of torch: {error}") from error


def _unwrapped(found: Any, path: Path) -> dict[str, Tensor]:
    import torch

    while isinstance(found, Mapping) and not any(isinstance(value, torch.Tensor) for value in found.values()):
        wrapper = next((key for key in WRAPPERS if isinstance(found.get(key), Mapping)), None)
        if wrapper is None:
            break
        found = found[wrapper]
    if not isinstance(found, Mapping):
        raise ConfigError(f"base.weights: {path} holds a {type(found).__name__}, not a state dict")
    state = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    if not state:
        raise ConfigError(
            f"base.weights: {path} holds no tensors (its keys: {', '.join(map(str, list(found)[:SHOWN]))})"
        )
    return state


def _differences(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    missing = [name for name in wanted if name not in state]
    extra = [name for name in state if name not in wanted]
    shapes = [
        f"{name} is {list(state[name].shape)}, the model wants {list(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    listed = (("lacks", missing), ("has besides", extra), ("shapes differ:", shapes))
    return [f"{what} {_some(names)}" for what, names in listed if names]


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
