"""YAML that remembers where everything stands, so that a config error can name its line.

Also stricter than plain YAML: a key given twice in one mapping is an error, not a silent override.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from leanserve.contracts import Json
from leanserve.errors import ConfigError

PathStep = str | int


@dataclass(frozen=True)
class YamlSource:
    """A parsed file: `value` as plain Python, `place` to find a line again."""

    path: Path
    value: Json
    root: yaml.Node | None

    def place(self, steps: Iterable[PathStep]) -> str:
        """`file:line` of the deepest node on the way; steps that are not in the file (union tags) are skipped."""
        node, line = self.root, 1 if self.root is None else self.root.start_mark.line + 1
        for step in steps:
            found = _child(node, step)
            if found is not None:
                node, line = found
        return f"{self.path}:{line}"


def read_yaml(path: Path) -> YamlSource:
    """Parse one YAML file.

    Raises:
        ConfigError: unreadable, not YAML, or a key given twice; the text starts with `file:line`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the config: {error}") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_duplicates(root, path, set())
        return YamlSource(path, yaml.safe_load(text), root)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}:1: not valid YAML: {error}") from error


def _child(node: yaml.Node | None, step: PathStep) -> tuple[yaml.Node, int] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == str(step):
                return value, key.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        item = node.value[step]
        return item, item.start_mark.line + 1
    return None


def _refuse_duplicates(node: yaml.Node | None, path: Path, visited: set[int]) -> None:
    # Aliases may share nodes, even recursively: each node is looked at once.
    if node is None or id(node) in visited:
        return
    visited.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, path, visited)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                raise ConfigError(f"{path}:{line}: key '{key.value}' was given already on line {seen[key.value]}")
            seen[key.value] = line
            _refuse_duplicates(value, path, visited)
