"""From stored artifacts to a model that can run: replay the structure, load the weights, repeat the load passes.

Nothing here trains or reads data, which is why a start from the cache takes seconds. What formats store is never
a pickle, and no code but the packages of `aot_inductor` (docs/decisions/026-packages-of-machine-code.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar, overload

from pydantic import TypeAdapter

from leanserve.artifacts.manifest import Recipe
from leanserve.artifacts.store import ArtifactStore
from leanserve.contracts import Model
from leanserve.passes import AnyPass
from leanserve.passes.base import Pass
from leanserve.runtime.formats import format_named

if TYPE_CHECKING:
    from torch import nn

_PASS: TypeAdapter[Pass] = TypeAdapter(AnyPass)
_Item = TypeVar("_Item")
Ancestry = Mapping[str, Recipe]
"""All recipes that an artifact is made of, by key."""


class StructureSource(Protocol):
    """What loading asks of a base."""

    def torch_module(self) -> nn.Module:
        """The base's own module, fresh."""


class OneByOne(Sequence[_Item]):
    """Items that are made whenever they are asked for, and kept by nobody but the one who asks."""

    def __init__(self, makers: Sequence[Callable[[], _Item]]) -> None:
        self._makers = makers

    def __len__(self) -> int:
        return len(self._makers)

    def __iter__(self) -> Iterator[_Item]:
        return (make() for make in self._makers)

    @overload
    def __getitem__(self, index: int) -> _Item: ...
    @overload
    def __getitem__(self, index: slice) -> OneByOne[_Item]: ...
    def __getitem__(self, index: int | slice) -> _Item | OneByOne[_Item]:
        return OneByOne(self._makers[index]) if isinstance(index, slice) else self._makers[index]()


def load_model(store: ArtifactStore, base: StructureSource, key: str) -> Model:
    """Load the artifact `key` of `base`, ready for a backend.

    Raises:
        ArtifactCorrupt: an artifact that it is made of is missing or damaged.
    """
    ancestry = {recipe.key: recipe for recipe in store.ancestry(key)}
    model = _stored_model(store, base, ancestry)
    for recipe in _line(ancestry, key):
        if recipe.kind is not None:
            model = _pass_of(recipe).on_load(model, recipe.decisions, store.folder(recipe.key))
    return model


def _line(ancestry: Ancestry, key: str) -> list[Recipe]:
    """From the base to an artifact, by the first parent of each."""
    recipe = ancestry[key]
    return [*(_line(ancestry, recipe.parents[0]) if recipe.parents else ()), recipe]


def _stored_model(store: ArtifactStore, base: StructureSource, ancestry: Ancestry) -> Model:
    """The last model of the ancestry that was saved."""
    holder, name = [(recipe, recipe.format) for recipe in ancestry.values() if recipe.format is not None][-1]
    rebuild = partial(_rebuilt, base, ancestry, holder.key)
    model: Model = format_named(name).load(store.folder(holder.key), holder.spec, rebuild)
    return model


def _rebuilt(base: StructureSource, ancestry: Ancestry, key: str) -> nn.Module:
    """The structure of an artifact, with weights of the base or none."""
    recipe = ancestry[key]
    if not recipe.parents:
        return base.torch_module()
    modules = OneByOne([partial(_rebuilt, base, ancestry, parent) for parent in recipe.parents])
    return _pass_of(recipe).rebuild_joined(modules, recipe.decisions)


def _pass_of(recipe: Recipe) -> Pass:
    return _PASS.validate_python(recipe.options)
