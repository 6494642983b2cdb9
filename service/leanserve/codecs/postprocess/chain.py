"""The steps of a config put together for one model: what they read is there and fits, what they write has a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from leanserve.codecs.postprocess.columns import WHOLE, Columns
from leanserve.codecs.postprocess.step import PostStep
from leanserve.contracts import Arrays, Json, ModelSpec, Placement, TensorSpec
from leanserve.errors import ConfigError


class PostChain:
    """Steps one after the other. `written` are the names of all answers, `ends` of those that no later step reads."""

    def __init__(self, steps: Sequence[PostStep], spec: ModelSpec, folder: Path) -> None:
        """`folder`: to which the paths in the steps are relative.

        Raises:
            ConfigError: a step reads what is not there or does not suit it; the text names the step.
        """
        readable = {item.name: item for item in spec.outputs}
        self._steps: dict[str, tuple[PostStep, tuple[str, ...]]] = {}
        for number, step in enumerate(steps):
            try:
                self._add(step.with_files(folder), spec, readable)
            except ConfigError as error:
                raise ConfigError(f"postprocess[{number}] ({_kind(step)}): {error}") from error
        self.written = tuple(self._steps)
        read = {name for _, names in self._steps.values() for name in names}
        self.ends = tuple(name for name in self.written if name not in read)
        self.costly = any(step.costly for step, _ in self._steps.values())

    def _add(self, step: PostStep, spec: ModelSpec, readable: dict[str, TensorSpec]) -> None:
        names = tuple(_found(name, readable, spec) for name in step.reads)
        name = step.name or step.writes
        if name in self._steps or name in readable:
            raise ConfigError(f"the name '{name}' is taken; give the step another (name)")
        fields = [readable[given] for given in names]
        fitted = step.fitted(fields, spec.labels)
        self._steps[name] = fitted, names
        given = fitted.gives(fields)
        if given is not None:
            readable[name] = TensorSpec(name, given.dtype, given.shape)

    def answers(
        self, outputs: Arrays, spec: ModelSpec, places: Sequence[Placement], names: Sequence[str]
    ) -> dict[str, Columns]:
        """The answers of these names to a batch of outputs, which are those of `spec`.

        Raises:
            BackendFailed: a number that a step reads is none.
        """
        known = {item.name: array for item, array in zip(spec.outputs, outputs, strict=True)}
        found: dict[str, Columns] = {}
        for name, (step, reads) in self._steps.items():
            if name in self._needed(names):
                found[name] = step.apply(tuple(known[read] for read in reads), places)
                if WHOLE in found[name].arrays:
                    known[name] = found[name].arrays[WHOLE]
        return {name: found[name] for name in names}

    def _needed(self, names: Sequence[str]) -> set[str]:
        """With what these are made of."""
        needed = set(names)
        for name in reversed(self.written):
            if name in needed:
                needed |= set(self._steps[name][1])
        return needed

    def described(self) -> list[Json]:
        """Every answer: its name, the step that makes it, and what that reads."""
        return [
            {"name": name, "kind": _kind(step), "reads": reads, "told": name in self.ends}
            for name, (step, reads) in self._steps.items()
        ]

    def schema(self) -> dict[str, Json]:
        """JSON schema of the answers to one row, by name."""
        return {name: step.shape for name, (step, _) in self._steps.items()}


def _found(name: str | None, readable: Mapping[str, TensorSpec], spec: ModelSpec) -> str:
    if name is None:
        if len(spec.outputs) > 1:
            raise ConfigError(f"output: say which, the model gives {', '.join(item.name for item in spec.outputs)}")
        return spec.outputs[0].name
    if name not in readable:
        raise ConfigError(f"output: there is no '{name}' to read here; there are {', '.join(readable)}")
    return name


def _kind(step: PostStep) -> str:
    return str(type(step).model_fields["kind"].default)
