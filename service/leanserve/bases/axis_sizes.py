"""On which sizes of its dynamic axes a model runs, found out by running it.

A file that leaves height and width open says nothing of what the network can do with them: one halves images five times
and takes multiples of 32, one reads lines of text of one height, one wants windows of exactly 512 samples. Requests of
other sizes would fail while serving, and so would every shape that is tried before that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Literal, NamedTuple

from leanserve.bases.probing import Run, SampledSpec, attempt, two_lengths
from leanserve.contracts import ModelSpec
from leanserve.errors import ConfigError
from leanserve.runtime.assembly import dynamic_axes

STEPS = ((1, 1), (16, 1), (32, 1), (64, 1), (1, 64), (1, 128), (1, 256))
"""Steps and least sizes of dynamic axes, in the order in which they are tried."""
HEIGHTS = (48, 32, 64, 80, 128, 224)
"""Of images whose width is as long as a text, or of spectrograms."""
LONE_SIZES = (
    *(16, 20, 32, 48, 64, 80, 96, 100, 112, 128, 160, 192, 224, 256, 299, 320, 384, 400, 416, 448, 480, 512),
    *(576, 600, 608, 640, 768, 800, 896, 1000, 1024, 1280, 1536, 2048, 4096, 8000, 16000),
)
"""What images, windows of samples and frames usually measure, for models that run on one size only."""


class AxisSizes(NamedTuple):
    """A spec with sizes of its dynamic axes on which the model runs, and what everyone must know of these."""

    spec: ModelSpec
    caveats: tuple[str, ...] = ()


def with_sizes(run: Run, spec: ModelSpec, names: Sequence[str], written: Sequence[int] = ()) -> AxisSizes:
    """Find sizes of the dynamic axes on which a model runs, from short ones to the longest that is served.

    `written` are sizes that stand in a graph, which may be the one that it was exported with.

    Where long ones fail, all dynamic axes of an input but the last get a size. Else shorter ones are served. Where a
    model runs on one size only, no axis stays dynamic.

    Raises:
        ConfigError: it runs on no size that was tried; the text says what was wrong with the first.
    """
    if not dynamic_axes(spec.inputs):
        return AxisSizes(spec)
    search = _Search(run, names, written)
    short = search.stepped(spec)
    found = short if short is not None and search.runs(short, short.max_length) else None
    found = found or search.of_one_height(spec) or (short and search.shorter(short)) or search.lone(spec)
    if found is None:
        raise search.failures[0]
    pairs = zip(found.inputs, spec.inputs, strict=True)
    changed = [f"{item.name} as {list(item.shape)}".replace("None", "any") for item, was in pairs if item != was]
    told = f"takes {' and '.join(changed)}, the first sizes on which it ran (base.inputs)"
    return AxisSizes(found, (told,) if changed else ())


class _Search:
    """Runs a model on single rows until it runs."""

    def __init__(self, run: Run, names: Sequence[str], written: Sequence[int]) -> None:
        self._run = run
        self._names = names
        self._written = written
        self.failures: list[ConfigError] = []

    def runs(self, spec: ModelSpec, *lengths: int) -> bool:
        try:
            for length in dict.fromkeys(lengths):
                attempt(self._run, spec.example(1, length), self._names)
        except ConfigError as error:
            self.failures.append(error)
            return False
        return True

    def stepped(self, spec: ModelSpec) -> ModelSpec | None:
        """With the sizes of which the two shortest that are tried run."""
        return next((tried for tried in _stepped(spec) if self.runs(tried, *two_lengths(tried))), None)

    def of_one_height(self, spec: ModelSpec) -> ModelSpec | None:
        """With one dynamic axis per input, the last, where one has several."""
        if all(item.shape.count(None) < 2 for item in spec.inputs):
            return None
        flat = (tried for height in HEIGHTS for tried in _stepped(_fixed(spec, height, "last")))
        return next((tried for tried in flat if self.runs(tried, *two_lengths(tried), tried.max_length)), None)

    def shorter(self, spec: ModelSpec) -> ModelSpec:
        """With a longest size that runs, at least the second that was tried."""
        least = two_lengths(spec)[1]
        halves = (replace(spec, max_length=max(spec.max_length // 2**times, least)) for times in range(1, 6))
        tried = (tried for tried in halves if self.runs(tried, tried.size(tried.max_length)))
        return next(tried, replace(spec, max_length=least))

    def lone(self, spec: ModelSpec) -> ModelSpec | None:
        """With one size for all dynamic axes; before all others, with the sizes of the user's own rows, then with those
        that stand in the graph."""
        own = [_shaped(spec, spec.own_shapes)] if isinstance(spec, SampledSpec) else []
        tried = chain(own, (_fixed(spec, size, "none") for size in dict.fromkeys((*self._written, *LONE_SIZES))))
        return next((one for one in tried if self.runs(one, 1)), None)


def _shaped(spec: ModelSpec, shapes: Sequence[tuple[int, ...]]) -> ModelSpec:
    pairs = zip(spec.inputs, shapes, strict=True)
    return replace(spec, inputs=tuple(replace(item, shape=shape) for item, shape in pairs))


def _stepped(spec: ModelSpec) -> Iterator[ModelSpec]:
    return (replace(spec, step=step, least=max(least, spec.least)) for step, least in STEPS)


def _fixed(spec: ModelSpec, size: int, spared: Literal["none", "last"]) -> ModelSpec:
    """With this size for all dynamic axes, or for all but the last of every input."""

    def shape(axes: tuple[int | None, ...]) -> tuple[int | None, ...]:
        dynamic = [place for place, axis in enumerate(axes) if axis is None]
        kept = dynamic[-1:] if spared == "last" else []
        return tuple(size if axis is None and place not in kept else axis for place, axis in enumerate(axes))

    return replace(spec, inputs=tuple(replace(item, shape=shape(item.shape)) for item in spec.inputs))
