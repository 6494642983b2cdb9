"""Checkpoints that somebody brought: which weights are in them, and which are taken.

Training scripts wrap a state dict in others, and keep an average of the weights over the last steps beside it. That is
made to be served and scores better, so it is taken where there is one; it is told, and a key of the config chooses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanserve.bases.fitting import closest, copy_weights, fits_whole, shortened
from leanserve.bases.weight_files import SAVE, read_weights, shards_of
from leanserve.disk import sha256_of
from leanserve.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

AVERAGED = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model_state_dict", "ema_model"),
    *("ema", "params_ema", "averaged_model"),
)
"""Keys of averages over the last steps of a training (EMA)."""
WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights", "params"),
    *("model_weights", "net_state_dict", "state"),
)
"""Keys under which training scripts put the state dict."""
DEEPEST = 6
"""Mappings within mappings."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file. Names are those of the mappings around a tensor and its own, joined by dots."""

    path: Path
    everything: Mapping[str, Tensor]
    taken: str = ""
    """What the names of the chosen weights begin with; empty: all tensors of the file."""
    others: tuple[str, ...] = ()
    """Further weights, where the config does not choose."""
    mappings: tuple[str, ...] = ()
    """The keys around tensors, of all mappings in the file."""

    def under(self, place: str) -> dict[str, Tensor]:
        """The tensors whose names begin so, by the rest of their names."""
        start = f"{place}." if place else ""
        return {name.removeprefix(start): self.everything[name] for name in self.everything if name.startswith(start)}

    def places_of(self, wanted: Iterable[str]) -> list[str]:
        """What the names of all those tensors begin with, elsewhere than in the chosen weights."""
        names = list(wanted)
        end = f".{names[0]}" if names else "."
        ends = [name.removesuffix(end) for name in self.everything if name.endswith(end)]
        whole = [place for place in ends if all(f"{place}.{name}" in self.everything for name in names)]
        return [place for place in whole if place != self.taken]

    @property
    def caveats(self) -> tuple[str, ...]:
        """What everyone must know of weights that the config did not choose."""
        others = " or ".join(self.others)
        return (f"weights are {self.taken}, not {others} (base.weights_key)",) if others else ()


def read_checkpoint(path: Path, key: str | None = None) -> Checkpoint:
    """The tensors of a file, and which of them are the weights: those under `key`, else as the names tell.

    Raises:
        ConfigError: missing, damaged, of a refused format, without tensors, or without any under `key`.
    """
    content = read_weights(path)
    everything = dict(_named(content))
    if not everything:
        keys = shortened(list(map(str, content)))
        raise ConfigError(f"base.weights: {path} holds no tensors with names (its keys: {keys}). {SAVE}")
    if key is None:
        return Checkpoint(path, everything, *_preferred(content), tuple(_mappings(content)))
    if not Checkpoint(path, everything).under(key):
        there = list(dict.fromkeys(name.partition(".")[0] for name in everything if "." in name))
        raise ConfigError(
            f"base.weights_key: {path} has no weights under '{key}'; there are {shortened(there) or 'no keys'}"
        )
    return Checkpoint(path, everything, key)


def read_state(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The state dict in a checkpoint, on the CPU; raises like `read_checkpoint`."""
    checkpoint = read_checkpoint(path, key)
    return checkpoint.under(checkpoint.taken)


def load_weights(module: nn.Module, path: Path, key: str | None = None) -> tuple[str, ...]:
    """Load a checkpoint into a module; every place must find its tensor, by the keys around it or by what fits.

    Returns:
        Caveats: what everyone must know of weights that the config did not choose, and of those left over.

    Raises:
        ConfigError: names, shapes or kinds of numbers differ; the text lists the first of each.
    """
    checkpoint = read_checkpoint(path, key)
    wanted = module.state_dict()
    places = _upwards(checkpoint.taken) if key is None else (key,)
    state = closest([checkpoint.under(place) for place in places], wanted)
    elsewhere = [] if key is not None or fits_whole(state, wanted) else _fitting(checkpoint, wanted)
    if len(elsewhere) == 1:
        state = closest([checkpoint.under(elsewhere[0])], wanted)
    problems, extra = copy_weights(state, module)
    if not problems:
        unused = (f"the file has weights that the model has no place for: {shortened(extra)}",) if extra else ()
        return checkpoint.caveats + unused
    others = elsewhere or checkpoint.places_of(wanted) or list(checkpoint.others)
    remedy = f". base.weights_key can choose others of this file: {shortened(others)}" if others else ""
    raise ConfigError(f"base.weights: {path} does not fit the model: {'; '.join(problems)}{remedy}")


def weights_digest(path: Path) -> str:
    """sha256 (hex) of the content of a file with weights, or of all its shards. Raises `ConfigError`."""
    digests = [file_digest(file) for file in shards_of(path)]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's content.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return sha256_of(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _named(content: Mapping[Any, Any], depth: int = 1) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in mappings within mappings, except those of optimizers."""
    import torch

    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            yield str(key), value
        elif isinstance(value, Mapping) and "param_groups" not in value and depth < DEEPEST:
            yield from ((f"{key}.{name}", tensor) for name, tensor in _named(value, depth + 1))


def _mappings(content: Mapping[Any, Any], place: str = "", depth: int = 1) -> Iterator[str]:
    """The keys around every mapping that has tensors in it."""
    for key, value in content.items():
        if isinstance(value, Mapping) and depth < DEEPEST and any(_named(value)):
            inner = f"{place}.{key}" if place else str(key)
            yield inner
            yield from _mappings(value, inner, depth + 1)


def _fitting(checkpoint: Checkpoint, wanted: Mapping[str, Tensor]) -> list[str]:
    """Where in the file weights for all of a model are, under keys that nobody knows."""
    unknown = (place for place in checkpoint.mappings if place not in checkpoint.others)
    found = [place for place in unknown if fits_whole(closest([checkpoint.under(place)], wanted), wanted)]
    return [place for place in found if not any(other.startswith(f"{place}.") for other in found)]


def _preferred(content: Mapping[Any, Any]) -> tuple[str, tuple[str, ...]]:
    """Where the weights are by the usual keys, from the outermost mapping inwards; and where further ones are."""
    place, others = "", []
    for _ in range(DEEPEST):
        known = [key for key in (*AVERAGED, *WRAPPERS) if isinstance(content.get(key), Mapping)]
        places = [f"{place}.{key}" if place else key for key in known if any(_named(content[key]))]
        if not places:
            break
        place, content = places[0], content[places[0].rpartition(".")[2]]
        others += places[1:]
    return place, tuple(others)


def _upwards(place: str) -> Iterator[str]:
    """A place and what is around it: the parts of a model may be in mappings that are called as if they were all."""
    yield place
    while place:
        place = place.rpartition(".")[0]
        yield place
