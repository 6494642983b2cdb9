"""What a torch module holds that decides its answers, so that two processes can tell whether they have the same one.

A state dict is not enough: buffers that are not saved, tensors and numbers kept as plain attributes, and what code
reads from the globals of its file decide answers too. So everything that can be reached from a module is written down,
tensors and arrays as digests, under paths that a reader can find again.

Objects of libraries count by their type, in a module also by their plain values: versions are known, and what else is
in them (locks, caches, numbers of registrations) changes from run to run.
"""

from __future__ import annotations

import argparse
import enum
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, np.generic, range, slice)
PLAIN_OF_TORCH = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
OPEN = (types.SimpleNamespace, argparse.Namespace)
"""Objects of the standard library that are what is put into them."""
CACHED = type(functools.cache(repr))
HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
LONG = 200
"""Characters from which plain values are told by their digest."""

Entries = dict[str, str]
Part = tuple[str, object]
Described = tuple[str, Iterable[Part]]
"""What stands for an object, and what is in it."""


class Held(NamedTuple):
    """Path -> value or digest: `inside` the module, and `around` it in globals and classes that its code reads."""

    inside: Entries
    around: Entries

    @property
    def digest(self) -> str:
        """sha256 (hex) over both."""
        lines = (f"{path} {token}" for entries in self for path, token in sorted(entries.items()))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def held_by(module: nn.Module, is_own: Callable[[str], bool]) -> Held:
    """Everything that a module holds and its code reads; `is_own` tells of a Python module that its code is the user's.

    What `__init__` reads is not looked at: what came of it is in the module.
    """
    reader = _Reader(is_own)
    reader.read("", module)
    return Held(reader.inside, reader.around)


def unlike(one: Entries, other: Entries) -> list[str]:
    """The paths at which two modules differ."""
    return [path for path in dict.fromkeys((*one, *other)) if one.get(path) != other.get(path)]


class _Reader:
    """Follows references, each object once; paths that begin with `::` lie outside of the module."""

    def __init__(self, is_own: Callable[[str], bool]) -> None:
        self.inside: Entries = {}
        self.around: Entries = {}
        self._is_own = is_own
        self._first: dict[int, str] = {}
        self._kept: list[object] = []  # an object that were freed could give its identity to another
        self._ways: tuple[tuple[type | tuple[type, ...], Callable[[str, Any], Described]], ...] = (
            (Tensor, lambda _, value: (_tensor(value), ())),
            (torch.Generator, lambda _, value: (_tensor(value.get_state()), ())),
            (np.ndarray, _of_array),
            (torch.jit.ScriptModule, _of_script),
            (nn.Module, self._of_module),
            (Mapping, _of_mapping),
            ((list, tuple), lambda path, value: (f"{_kind(value)} of {len(value)}", _items(path, value))),
            ((set, frozenset), lambda _, value: (f"{_kind(value)} of {sorted(map(_label, value))}", ())),
            (types.FunctionType, lambda path, value: (_name(value), self._of_function(path, value))),
            (types.MethodType, lambda path, value: (_kind(value), _items(path, [value.__self__, value.__func__]))),
            (functools.partial, lambda path, value: (_kind(value), _items(path, value.__reduce__()[2][:3]))),
            (CACHED, lambda path, value: (_kind(value), _items(path, [value.__wrapped__]))),
            (type, lambda _, value: (_name(value), self._of_classes(value))),
        )

    def read(self, path: str, root: object) -> None:
        waiting = [(path, root)]
        while waiting:
            path, value = waiting.pop()
            entries = self.around if path.startswith("::") else self.inside
            if (plain := _flat(value)) is not None:
                entries[path] = plain if len(plain) < LONG else hashlib.sha256(plain.encode()).hexdigest()
            elif id(value) in self._first:
                entries[path] = f"the same as {self._first[id(value)]}"
            else:
                self._first[id(value)] = path
                self._kept.append(value)
                ways = (way for kinds, way in self._ways if isinstance(value, kinds))
                entries[path], parts = next(ways, self._of_object)(path, value)
                waiting += reversed(list(parts))

    def _of_module(self, path: str, module: nn.Module) -> Described:
        return _kind(module), (*_parts_of_module(path, module), *self._of_classes(type(module)))

    def _of_object(self, path: str, value: Any) -> Described:
        """An object of the user's own, or of a library."""
        attributes = getattr(value, "__dict__", {})
        if self._is_own(type(value).__module__) or is_dataclass(value) or isinstance(value, OPEN):
            slots = [name for base in type(value).__mro__ for name in _slots(base) if hasattr(value, name)]
            held = {**attributes, **{name: getattr(value, name) for name in slots}}
            own = ((f"{path}.{name}", part) for name, part in held.items())
            return _kind(value), (*own, *self._of_classes(type(value)))
        if path.startswith("::") or type(value).__module__.partition(".")[0] in {*sys.stdlib_module_names, "torch"}:
            return _kind(value), ()
        plain = {name: part for name, part in attributes.items() if _flat(part) is not None}
        return _kind(value), [(f"{path}.attributes", plain)]

    def _of_function(self, path: str, function: types.FunctionType) -> Iterator[Part]:
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        yield f"{path}.closure", (cells, function.__defaults__, function.__kwdefaults__)
        if not self._is_own(function.__module__):
            return
        names = set(_names(function.__code__))
        for name in sorted(names & function.__globals__.keys()):
            found = function.__globals__[name]
            if not isinstance(found, types.ModuleType):
                yield _outside(function.__module__, name), found
            elif self._is_own(found.__name__):
                for inner in sorted(names & vars(found).keys()):
                    yield _outside(found.__name__, inner), vars(found)[inner]

    def _of_classes(self, kind: type) -> Iterator[Part]:
        """Methods and values of a class and of those that it is made from, as far as they are the user's own.

        Of a class of modules only what is reached from `forward`: training may use what changes from run to run.
        """
        bases = [base for base in kind.__mro__ if self._is_own(base.__module__)]
        reached = _reached(bases) if issubclass(kind, nn.Module) else None
        for base in bases:
            for name, value in sorted(vars(base).items()):
                if name in reached if reached is not None else name == "__call__" or not name.startswith("__"):
                    yield _outside(base.__module__, f"{base.__qualname__}.{name}"), _unbound(value)


def _parts_of_module(path: str, module: nn.Module) -> Iterator[Part]:
    if isinstance(module, fx.GraphModule):
        yield _joined(path, "code"), module.code
    for name, value in vars(module).items():
        if name in {"_parameters", "_buffers", "_modules"}:
            yield from ((_joined(path, leaf), part) for leaf, part in value.items())
        elif name.endswith(HOOKS) and isinstance(value, dict):
            yield _joined(path, name), [*value.values()]  # the keys count hooks of the whole process
        elif not name.startswith("_torchdynamo"):  # torch.compile numbers its wrappers
            yield _joined(path, name), value


def _of_script(path: str, module: torch.jit.ScriptModule) -> Described:
    """Tensors and code of a scripted or traced module, constants in the code included."""
    parts: list[Part] = [(_joined(path, name), part) for name, part in module.named_parameters()]
    parts += [(_joined(path, name), part) for name, part in module.named_buffers()]
    for name, inner in module.named_modules():
        if hasattr(inner, "forward"):
            code, constants = inner.code_with_constants
            parts.append((_joined(path, f"{name}.code"), (code, dict(constants.const_mapping))))
    return _kind(module), parts


def _of_array(path: str, value: np.ndarray[Any, Any]) -> Described:
    kind = f"{value.dtype} {list(value.shape)}"
    if value.dtype.hasobject:
        return kind, _items(path, value.ravel().tolist())
    return f"{kind} {hashlib.sha256(np.ascontiguousarray(value).data).hexdigest()}", ()


def _of_mapping(path: str, value: Mapping[Any, object]) -> Described:
    names = list(map(_label, value))
    return f"{_kind(value)} of {names}", [
        (f"{path}[{name}]", value[key]) for name, key in zip(names, value, strict=True)
    ]


def _slots(kind: type) -> tuple[str, ...]:
    names = vars(kind).get("__slots__", ())
    return (names,) if isinstance(names, str) else tuple(names)


def _plain(value: object) -> str | None:
    """A value that says all of itself; of a path the last part, because the same file may lie elsewhere."""
    if isinstance(value, str | PurePath) and (path := PurePath(value)).is_absolute():
        return path.name
    return repr(value) if isinstance(value, (*PLAIN, *PLAIN_OF_TORCH, PurePath)) else None


def _flat(value: object) -> str | None:
    """The same of lists, tuples and mappings of such values, in which nothing else is."""
    if (plain := _plain(value)) is not None:
        return plain
    if isinstance(value, dict | list | tuple):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        found = [plain for part in parts if (plain := _plain(part)) is not None]
        if len(found) == len(parts):
            return f"{type(value).__qualname__} {found}"
    return None


def _label(value: object) -> str:
    return _plain(value) or type(value).__qualname__


def _items(path: str, values: Any) -> Iterator[Part]:
    return ((f"{path}[{index}]", value) for index, value in enumerate(values))


def _kind(value: object) -> str:
    return _name(type(value))


def _name(value: type | types.FunctionType) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _outside(module: str, name: str) -> str:
    return f"::{module}.{name}"


def _unbound(value: Any) -> object:
    """What is behind a static method, a class method or a property."""
    if isinstance(value, property | functools.cached_property):
        return value.fget if isinstance(value, property) else value.func
    return value.__func__ if isinstance(value, staticmethod | classmethod) else value


def _reached(bases: Sequence[type]) -> set[str] | None:
    """Names of the attributes that `forward` uses, directly or through others; `None`: a library has the `forward`."""
    if not any("forward" in vars(base) for base in bases):
        return None
    found: set[str] = set()
    waiting = ["forward", "__call__"]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            methods = (_unbound(vars(base)[name]) for base in bases if name in vars(base))
            waiting += [used for method in methods if callable(method) for used in _names_in(inspect.unwrap(method))]
    return found


def _names(code: types.CodeType) -> Iterator[str]:
    """Names of globals and attributes in a function and in those inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _names_in(value: object) -> Iterator[str]:
    return _names(value.__code__) if isinstance(value, types.FunctionType) else iter(())


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _tensor(value: Tensor) -> str:
    kind = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if value.is_meta or isinstance(value, nn.parameter.UninitializedParameter | nn.parameter.UninitializedBuffer):
        return f"{kind} without values"
    plain = value.detach()
    if plain.is_quantized:
        kind, plain = f"{kind} {plain.qscheme()}", plain.dequantize()
    plain = plain.to_dense() if plain.layout != torch.strided else plain
    raw = plain.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{kind} {hashlib.sha256(raw.numpy().data).hexdigest()}"
