"""From a variant to its chain of cache keys, without importing anything heavy.

A key is a sha256 over everything that decides an artifact: parent key, pass and options with defaults filled, content
of files that options name, source of the pass and of the tools it shares with others, base (code, weights, data), seed,
library versions and, for results bound to the hardware, the instruction set. Variants that share their first passes
share those keys.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from leanserve.bases.checkpoints import file_digest
from leanserve.config.schema import ServiceConfig, VariantConfig
from leanserve.contracts import Base, Json
from leanserve.hardware import isa_flags, library_version
from leanserve.passes.base import Pass

FORMAT = 2
"""Raise when the layout of artifacts changes."""


@dataclass(frozen=True)
class RecipeStep:
    """One prefix of a variant: the artifact `key` is made by `pass_` (`None` for the base) from `parent`."""

    key: str
    parent: str | None
    pass_: Pass | None
    position: int


def steps_of(config: ServiceConfig, base: Base, variant: VariantConfig) -> tuple[RecipeStep, ...]:
    """The base and every prefix of the variant's passes, in building order."""
    steps = [RecipeStep(_digest({"format": FORMAT, "base": base.digest}), None, None, 0)]
    for position, pass_ in enumerate(variant.passes, start=1):
        parent = steps[-1].key
        steps.append(RecipeStep(_digest(_ingredients(pass_, parent, config.seed)), parent, pass_, position))
    return tuple(steps)


def versions_of(libraries: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of distributions; one that is missing counts as `absent`."""
    return {name: library_version(name) or "absent" for name in libraries}


def _ingredients(pass_: Pass, parent: str, seed: int) -> Json:
    return {
        "format": FORMAT,
        "parent": parent,
        "options": pass_.model_dump(mode="json"),
        "contents": _contents(pass_),
        "source": _source_digest(type(pass_)),
        "seed": seed,
        "versions": versions_of(pass_.libraries),
        "isa": sorted(isa_flags()) if pass_.isa_bound else None,
    }


def _contents(pass_: Pass) -> dict[str, str]:
    """Digests of files that options name: a path says nothing of what lies there."""
    options = {name: getattr(pass_, name) for name in type(pass_).model_fields}
    return {name: file_digest(value) for name, value in options.items() if isinstance(value, Path)}


def _digest(ingredients: Json) -> str:
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


@cache
def _source_digest(pass_: type[Pass]) -> str:
    digest = hashlib.sha256(Path(inspect.getfile(pass_)).read_bytes())
    for tool in sorted(Path(__file__).parent.glob("tools/*.py")):
        digest.update(tool.read_bytes())
    return digest.hexdigest()
