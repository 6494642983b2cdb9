"""YAML that remembers where everything stands, so that a config error can name its line.

Also stricter than plain YAML: a key given twice in one mapping is an error, not a silent override. And bounded: a few
lines of aliases can stand for more than any memory holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from leanserve.contracts import Json
from leanserve.disk import open_regular
from leanserve.errors import ConfigError

PathStep = str | int
MOST_BYTES = 16 * 2**20
MOST_NODES = 1_000_000
"""Of the file with its aliases written out: ten thousand times what is usual."""
_ODD = re.compile("[\\0\\ud800-\\udfff]")


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
    text = _text(path)
    root: yaml.Node | None = None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_odd(root, path, set())
        if root is not None and _expanded(root, path, {}) > MOST_NODES:
            raise ConfigError(
                f"{path}:1: its aliases stand for more than {MOST_NODES} entries; write them out, or fewer"
            )
        return YamlSource(path, yaml.safe_load(text), root)
    except RecursionError:
        raise ConfigError(f"{path}:1: it is nested too deeply to be a config; see docs/config.md") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise ConfigError(f"{path}:{line}: not valid YAML: the character {error.character!r} is not allowed") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}:1: not valid YAML: {str(error).splitlines()[0]}") from error
    except ValueError as error:  # a date or a number that is none
        raise ConfigError(f"{path}:{_line_of_value(root)}: not valid YAML: {error}") from error


def _text(path: Path) -> str:
    try:
        with open_regular(path) as stream:
            content = stream.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config: {error.strerror}; name one with --config") from error
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{path}: a config of more than {MOST_BYTES >> 20} MiB is not read; is it another file?")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file in that encoding") from error


def _child(node: yaml.Node | None, step: PathStep) -> tuple[yaml.Node, int] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == str(step):
                return value, key.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        item = node.value[step]
        return item, item.start_mark.line + 1
    return None


def _refuse_odd(node: yaml.Node | None, path: Path, visited: set[int]) -> None:
    """What YAML allows, and no config means: a key twice, or that is no text; characters that no name or path has."""
    # Aliases may share nodes, even recursively: each node is looked at once.
    if node is None or id(node) in visited:
        return
    visited.add(id(node))
    if isinstance(node, yaml.ScalarNode) and _ODD.search(node.value):
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: a text has a NUL or half a character; take it out")
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_odd(item, path, visited)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{path}:{line}: a key is a list or a mapping; keys are texts")
            if key.value in seen:
                raise ConfigError(f"{path}:{line}: key '{key.value}' was given already on line {seen[key.value]}")
            seen[key.value] = line
            _refuse_odd(value, path, visited)


def _expanded(node: yaml.Node, path: Path, known: dict[int, int]) -> int:
    """Nodes that a node stands for, with its aliases written out."""
    if id(node) in known:
        if not known[id(node)]:
            raise ConfigError(f"{path}:{node.start_mark.line + 1}: an alias stands within what it stands for")
        return known[id(node)]
    known[id(node)] = 0
    parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    inner = 0 if isinstance(node, yaml.ScalarNode) else sum(_expanded(part, path, known) for part in parts)
    known[id(node)] = 1 + inner
    return 1 + inner


def _line_of_value(node: yaml.Node | None) -> int:
    """The line of the first value that cannot be read; 1 if that is none."""
    parts: list[yaml.Node] = [] if node is None else [node]
    while parts:
        part = parts.pop(0)
        if isinstance(part, yaml.ScalarNode):
            try:
                yaml.SafeLoader("").construct_object(part)
            except (ValueError, yaml.YAMLError):
                return part.start_mark.line + 1
        elif isinstance(part, yaml.MappingNode):
            parts[:0] = [each for pair in part.value for each in pair]
        else:
            parts[:0] = part.value
    return 1
