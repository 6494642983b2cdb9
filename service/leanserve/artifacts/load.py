"""From stored artifacts to a model that can run: replay the structure, load the weights, repeat the load passes.

Nothing here trains or reads data, which is why a start from the cache takes seconds. What formats store is no code, and
never a pickle; no code is ever loaded from the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from leanserve.artifacts.manifest import Recipe
from leanserve.artifacts.store import ArtifactStore
from leanserve.contracts import Base, Model
from leanserve.passes import AnyPass
from leanserve.passes.base import Pass
from leanserve.runtime.formats import format_named

if TYPE_CHECKING:
    from torch import nn

_PASS: TypeAdapter[Pass] = TypeAdapter(AnyPass)


def load_model(store: ArtifactStore, base: Base, key: str) -> Model:
    """Load the artifact `key` of `base`, ready for a backend.

    Raises:
        ArtifactCorrupt: an artifact of the chain is missing or damaged.
    """
    chain = store.chain(key)
    model = _stored_model(store, base, chain)
    for recipe in chain:
        if recipe.kind is not None:
            model = _pass_of(recipe).on_load(model, recipe.decisions, store.folder(recipe.key))
    return model


def _stored_model(store: ArtifactStore, base: Base, chain: Sequence[Recipe]) -> Model:
    """The last model of the chain that was saved."""
    position, name = [(at, recipe.format) for at, recipe in enumerate(chain) if recipe.format is not None][-1]
    holder = chain[position]

    def rebuild() -> nn.Module:
        module = base.torch_module()
        for recipe in chain[1 : position + 1]:
            module = _pass_of(recipe).rebuild_structure(module, recipe.decisions)
        return module

    model: Model = format_named(name).load(store.folder(holder.key), holder.spec, rebuild)
    return model


def _pass_of(recipe: Recipe) -> Pass:
    return _PASS.validate_python(recipe.options)
