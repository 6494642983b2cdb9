"""How tensors with names find into a torch module, where wrappers have changed the names on the way.

Names are compared as they are and with what wrappers put before them taken off, one at a time. The module's own loading
has the last word, because modules know how they were named by older versions of torch and what they can do without.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor, nn

StateDict: TypeAlias = "dict[str, Tensor]"

PREFIXES = ("module.", "model.", "net.")
"""What DataParallel and AveragedModel, Lightning and scripts put before every name."""
INNER = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What torch.compile, FSDP and activation checkpointing call the module inside, anywhere in a name."""
COUNTERS = frozenset({"n_averaged"})
"""Among the tensors of AveragedModel, but no weight: how many models it has seen."""
SHOWN = 4


def closest(states: Iterable[StateDict], wanted: Mapping[str, Tensor]) -> StateDict:
    """Of all states, with and without the names of wrappers, the one whose names are most like those wanted."""
    unwrapped = [stage for state in states for stage in _unwrapped(state, wanted)]
    return max(unwrapped, key=lambda state: (len(state.keys() & wanted.keys()), -len(state)))


class Fit(NamedTuple):
    """What of a state did not find its place in a module, as text (empty: everything did), and what was left over."""

    problems: list[str]
    extra: list[str]


def copy_weights(state: Mapping[str, Tensor], module: nn.Module) -> Fit:
    """Copy a state into a module, in the module's precision.

    Tensors that only training used (a loss with weights of its own, a second head) are left over.
    """
    import torch

    wanted = {name: item for name, item in module.state_dict().items() if isinstance(item, torch.Tensor)}
    unlike = _unlike(state, wanted)
    try:
        left = module.load_state_dict({name: state[name] for name in state if name not in unlike}, strict=False)
    except RuntimeError as error:
        return Fit([str(error).splitlines()[-1].strip()], [])
    ties = _ties(wanted)
    missing = [name for name in left.missing_keys if name not in unlike and not ties[name] & state.keys()]
    listed = (
        ("lacks", missing),
        ("has besides", left.unexpected_keys),
        ("shapes differ:", list(unlike.values())),
        ("differ, though they are one tensor in the model:", _torn(state, ties)),
    )
    extra = list(left.unexpected_keys)
    problems = {what: names for what, names in listed if names}
    alone = problems.keys() == {"has besides"}
    return Fit([] if alone else [f"{what} {shortened(names)}" for what, names in problems.items()], extra)


def fits_whole(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Whether a state has a tensor for every name, of the same shape."""
    return all(name in state and state[name].shape == tensor.shape for name, tensor in wanted.items())


def shortened(names: list[str]) -> str:
    """The first few, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _unwrapped(state: StateDict, wanted: Mapping[str, Tensor]) -> Iterator[StateDict]:
    """The state as it is, and with one more wrapper taken off the names each time."""
    yield state
    state = {".".join(part for part in name.split(".") if part not in INNER): state[name] for name in state}
    while state:
        state = {name: state[name] for name in state if name in wanted or name not in COUNTERS}
        yield state
        prefix = next((known for known in PREFIXES if all(name.startswith(known) for name in state)), None)
        if prefix is None:
            return
        state = {name.removeprefix(prefix): state[name] for name in state}


def _unlike(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, str]:
    """Tensors that are not those of the model, though they are called so."""
    from torch.nn.parameter import is_lazy

    found = {}
    for name in state.keys() & wanted.keys():
        have, want = state[name], wanted[name]
        if is_lazy(want):
            continue
        if have.shape != want.shape:
            found[name] = f"{name} is {list(have.shape)}, the model wants {list(want.shape)}"
        elif have.is_quantized or (want.is_floating_point() and not have.is_floating_point()):
            kind = str(have.dtype).removeprefix("torch.")
            found[name] = f"{name} is {kind}, the model wants {str(want.dtype).removeprefix('torch.')}"
    return {name: found[name] for name in wanted if name in found}


def _ties(wanted: Mapping[str, Tensor]) -> Mapping[str, set[str]]:
    """Per name the other names of the same tensor."""
    from torch.nn.parameter import is_lazy

    same = defaultdict(set)
    for name, tensor in wanted.items():
        if not is_lazy(tensor) and tensor.numel():
            same[tensor.data_ptr(), tensor.shape, tensor.stride()].add(name)
    return defaultdict(set, {name: group - {name} for group in same.values() for name in group})


def _torn(state: Mapping[str, Tensor], ties: Mapping[str, set[str]]) -> list[str]:
    pairs = [(name, other) for name in ties if name in state for other in ties[name] & state.keys() if name < other]
    return [f"{name} and {other}" for name, other in pairs if not state[name].equal(state[other])]
