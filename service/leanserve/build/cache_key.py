"""From a variant to the cache keys of all that it is made of, without importing anything heavy.

A key is a sha256 over everything that decides an artifact: its parents' keys, pass and options with defaults filled, of
files that options name the content instead of the path, source of the pass and of all that it imports of ours, base
(code, weights, data), seed, library versions and, for results bound to the hardware, the instruction set. Variants that
share their first passes share those keys.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic_core import to_jsonable_python

from leanserve.bases.checkpoints import file_digest
from leanserve.build.source_closure import closure_digest
from leanserve.config.schema import ServiceConfig
from leanserve.config.variant_section import VariantConfig
from leanserve.contracts import Base, Json
from leanserve.hardware import Hardware, library_version
from leanserve.passes.base import Pass

FORMAT = 3
"""Raise when the layout of artifacts changes."""
ROOT = Path(__file__).parent.parent
"""The folder of our package."""


@dataclass(frozen=True)
class RecipeStep:
    """The artifact `key` is made by `pass_` (`None` for the base) from the artifacts `parents`.

    The pass stands at `position`, from 1, in the variant of that name; others may share it.
    """

    key: str
    parents: tuple[str, ...]
    pass_: Pass | None
    position: int
    variant: str


def steps_of(config: ServiceConfig, base: Base, variant: VariantConfig, hardware: Hardware) -> tuple[RecipeStep, ...]:
    """All that a variant is made of, each artifact once, in building order: the base first, the variant itself last."""
    return _Recipes(config, base, hardware).steps(variant)


class _Recipes:
    """The steps of variants that may be made of each other."""

    def __init__(self, config: ServiceConfig, base: Base, hardware: Hardware) -> None:
        self._named = {item.name: item for item in config.variants}
        self._seed = config.seed
        self._base = base
        self._hardware = hardware
        self._known: dict[str, tuple[RecipeStep, ...]] = {}
        """Those of variants that were met already, by name."""

    def steps(self, variant: VariantConfig) -> tuple[RecipeStep, ...]:
        if variant.name not in self._known:
            self._known[variant.name] = self._fresh(variant)
        return self._known[variant.name]

    def _fresh(self, variant: VariantConfig) -> tuple[RecipeStep, ...]:
        root = RecipeStep(_digest({"format": FORMAT, "base": self._base.digest}), (), None, 0, variant.name)
        lines = [self.steps(self._named[name]) for name in variant.parent_names] or [(root,)]
        steps = {step.key: step for line in lines for step in line}
        parents = tuple(line[-1].key for line in lines)
        for position, pass_ in enumerate(variant.passes, start=1):
            ingredients = _ingredients(pass_, parents, self._seed, self._hardware)
            if pass_.evaluates and self._base.score_digest:
                ingredients |= {"score": self._base.score_digest}
            key = _digest(ingredients)
            steps[key] = RecipeStep(key, parents, pass_, position, variant.name)
            parents = (key,)
        return tuple(steps.values())


def versions_of(libraries: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of distributions; one that is missing counts as `absent`."""
    return {name: library_version(name) or "absent" for name in libraries}


def _ingredients(pass_: Pass, parents: Sequence[str], seed: int, hardware: Hardware) -> Json:
    bound = pass_.isa_bound or pass_.times
    return {
        "format": FORMAT,
        "parents": list(parents),
        "options": _by_content(pass_.model_dump()),
        "source": closure_digest(Path(inspect.getfile(type(pass_))), ROOT),
        "seed": seed,
        "versions": versions_of(pass_.libraries),
        "isa": list(hardware.isa) if bound else None,
    } | ({"gpu": hardware.machine} if bound and hardware.on_gpu else {})


def _by_content(value: Json) -> Json:
    """Options as JSON, a file by the digest of its content: a path says nothing of what lies there."""
    if isinstance(value, Path):
        return {"sha256": file_digest(value)}
    if isinstance(value, Mapping):
        return {str(name): _by_content(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_by_content(item) for item in value]
    return to_jsonable_python(value)


def _digest(ingredients: Json) -> str:
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
