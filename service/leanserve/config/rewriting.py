"""The section `traffic` of a config file, written by the service itself: what an admin has chosen outlives the process.

All other lines stay as they are, comments included; those within the section are lost.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import yaml

from leanserve.config.schema import read_config
from leanserve.config.yaml import read_yaml
from leanserve.errors import ConfigError

TRAFFIC: Final = "traffic"


def write_traffic(path: Path, weights: Mapping[str, float], caps: Mapping[str, float]) -> None:
    """Have the file at `path` share traffic out by these, in one step.

    Raises:
        ConfigError: the file is not as it was when it was read, or would not be valid. OSError: it cannot be written.
    """
    path = path.resolve()  # a link stays one
    content = _rewritten(path, weights, caps)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    made = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        made.chmod(path.stat().st_mode & 0o7777)
        read_config(made)  # before anybody else does
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)


def _rewritten(path: Path, weights: Mapping[str, float], caps: Mapping[str, float]) -> str:
    source = read_yaml(path)
    if not isinstance(source.root, yaml.MappingNode) or source.root.flow_style:
        raise ConfigError(f"{path}:1: the config must be a mapping of a line per key to be written by the service")
    given = {"weights": dict(weights), "caps": dict(caps)}
    kept = {key: value for key, value in (source.value.get(TRAFFIC) or {}).items() if key not in given}
    section = {key: value for key, value in given.items() if value} | kept
    text = yaml.safe_dump({TRAFFIC: section}, sort_keys=False) if section else ""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for position, (key, value) in enumerate(source.root.value):
        if key.value == TRAFFIC:
            last = position + 1 == len(source.root.value)
            after = (
                _end(lines, value.end_mark.line, value) if last else source.root.value[position + 1][0].start_mark.line
            )
            while not last and after > key.start_mark.line + 1 and _is_between(lines[after - 1]):
                after -= 1  # comments and blank lines before the next key are its own
            return "".join((*lines[: key.start_mark.line], text, *lines[after:]))
    ended = [] if not lines or lines[-1].endswith("\n") else ["\n"]
    return "".join((*lines, *ended, text))


def _end(lines: list[str], line: int, value: yaml.Node) -> int:
    """The first line after a value that ends the file."""
    after = line if value.end_mark.column == 0 else line + 1
    while after > value.start_mark.line + 1 and after <= len(lines) and _is_between(lines[after - 1]):
        after -= 1
    return after


def _is_between(line: str) -> bool:
    return not line.strip() or line.startswith("#")
