"""One grammar by which every pass names the layers it works on, so that users learn it once.

A pattern is a glob over dotted module names (`stage2.*`, `*.conv1`), or `type:Conv2d` for a class (its subclasses
included). A pattern that matches a block selects everything inside the block. A misspelt pattern must never silently
compress nothing, so one that matches no module is an error that shows near names.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar, overload

from pydantic import BaseModel, ConfigDict

from leanserve.errors import PassFailed

if TYPE_CHECKING:
    from torch import nn

TYPE_PREFIX = "type:"
Layer = TypeVar("Layer", bound="nn.Module")


class Targets(BaseModel):
    """Which layers a pass may touch: those matched by `include` and not by `exclude`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    @overload
    def select(self, module: nn.Module) -> dict[str, nn.Module]: ...

    @overload
    def select(self, module: nn.Module, *types: type[Layer]) -> dict[str, Layer]: ...

    def select(self, module: nn.Module, *types: type[Any]) -> dict[str, Any]:
        """The targeted submodules that are instances of `types` (any type if none is given), by dotted name.

        The module itself is never selected, because a pass could not replace it. A layer that stands under several
        names is matched by each of them, and selected once, by the first.

        Raises:
            PassFailed: a pattern matches nothing; for `include`, nothing of `types`.
        """
        modules = {name: child for name, child in module.named_modules(remove_duplicate=False) if name}
        candidates = {name: child for name, child in modules.items() if not types or isinstance(child, types)}
        for pattern in self.include:
            self._check("include", pattern, candidates, modules)
        for pattern in self.exclude:
            self._check("exclude", pattern, modules, modules)
        wanted = {child for name, child in candidates.items() if _matches(self.include, name, modules)}
        barred = {child for name, child in candidates.items() if _matches(self.exclude, name, modules)}
        return {name: child for name, child in module.named_modules() if child in wanted - barred}

    def _check(self, option: str, pattern: str, wanted: dict[str, nn.Module], modules: dict[str, nn.Module]) -> None:
        if any(_matches((pattern,), name, modules) for name in wanted):
            return
        near = get_close_matches(pattern.removeprefix(TYPE_PREFIX), _names(pattern, wanted or modules), n=5, cutoff=0.4)
        hint = (
            f"near names: {', '.join(near)}" if near else f"it has {', '.join(_names(pattern, wanted)[:8]) or 'none'}"
        )
        raise PassFailed(f"targets.{option}: {pattern!r} matches no layer that this pass can work on; {hint}")


def _matches(patterns: tuple[str, ...], name: str, modules: dict[str, nn.Module]) -> bool:
    return any(
        _matches_module(pattern, holder, modules[holder]) for holder in _self_and_holders(name) for pattern in patterns
    )


def _self_and_holders(name: str) -> Iterator[str]:
    """`a.b.c` -> `a.b.c`, `a.b`, `a`."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _matches_module(pattern: str, name: str, module: nn.Module) -> bool:
    if pattern.startswith(TYPE_PREFIX):
        return pattern.removeprefix(TYPE_PREFIX) in {kind.__name__ for kind in type(module).__mro__}
    return fnmatchcase(name, pattern)


def _names(pattern: str, modules: dict[str, nn.Module]) -> list[str]:
    if pattern.startswith(TYPE_PREFIX):
        return sorted({type(child).__name__ for child in modules.values()})
    return list(modules)
