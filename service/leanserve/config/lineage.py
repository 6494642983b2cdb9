"""Which variants are made of which: `parent` and `parents`, checked before any work, and the order of building.

A variant without either begins with the base. One parent is gone on from; several are joined by the first pass.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

from leanserve.config.variant_section import VariantConfig
from leanserve.passes import ALL


def parents_fault(variants: Sequence[VariantConfig]) -> str | None:
    """What is wrong with the parents of some variant, after the key that says it; `None`: nothing."""
    names = [variant.name for variant in variants]
    for index, variant in enumerate(variants):
        key = "parents" if variant.parents else "parent"
        for position, text in (*_faults_of_names(variant, names), *_faults_of_joining(variant)):
            place = key if position is None else f"passes[{position}]"
            return f"variants[{index}].{place} of variant '{variant.name}': {text}"
    return _circle(variants)


def building_order(variants: Sequence[VariantConfig]) -> tuple[VariantConfig, ...]:
    """Parents before what is made of them."""
    by_name = {variant.name: variant for variant in variants}
    return tuple(by_name[name] for name in TopologicalSorter(_graph(variants)).static_order())


def lineage(variants: Sequence[VariantConfig], variant: VariantConfig) -> tuple[VariantConfig, ...]:
    """A variant and all that it is made of, each once, in building order."""
    by_name = {item.name: item for item in variants}
    wanted, waiting = set(), [variant.name]
    while waiting:
        name = waiting.pop()
        wanted.add(name)
        waiting += [parent for parent in by_name[name].parent_names if parent not in wanted]
    return building_order([item for item in variants if item.name in wanted])


def _graph(variants: Sequence[VariantConfig]) -> Mapping[str, Sequence[str]]:
    return {variant.name: variant.parent_names for variant in variants}


def _circle(variants: Sequence[VariantConfig]) -> str | None:
    try:
        TopologicalSorter(_graph(variants)).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        [(index, key)] = [
            (index, "parents" if variant.parents else "parent")
            for index, variant in enumerate(variants)
            if variant.name == circle[0]
        ]
        way = " <- ".join(circle)
        return (
            f"variants[{index}].{key} of variant '{circle[0]}': a circle, {way}; one of them must begin with the base"
        )
    return None


Fault = tuple[int | None, str]
"""Position of the pass that is to blame, `None` for the parents; and what is wrong."""


def _faults_of_names(variant: VariantConfig, names: Sequence[str]) -> Iterator[Fault]:
    if variant.parent is not None and variant.parents:
        yield (
            None,
            "'parent' is the one that it goes on from, 'parents' are several that it joins; write one of the two",
        )
    for position, name in enumerate(variant.parent_names):
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            remedy = f"did you mean '{near[0]}'?" if near else f"variants are {', '.join(names)}"
            yield None, f"'{name}' is no variant; {remedy}"
        if name in variant.parent_names[:position]:
            yield None, f"'{name}' is named twice"


def _faults_of_joining(variant: VariantConfig) -> Iterator[Fault]:
    joining = [position for position, step in enumerate(variant.passes) if step.joins]
    known = ", ".join(str(step.model_fields["kind"].default) for step in ALL if step.joins)
    if variant.parents and len(variant.parents) == 1:
        yield None, f"one alone is not joined; write 'parent: {variant.parents[0]}', or name the others"
    if variant.parents and 0 not in joining:
        yield None, f"several are joined by the first pass, and it is none that joins; those that do: {known}"
    for position in joining:
        if position or not variant.parents:
            kind = variant.passes[position].kind
            yield position, f"'{kind}' joins several variants: it is the first pass, and 'parents' names them"
