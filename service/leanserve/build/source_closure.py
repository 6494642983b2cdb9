"""Which files of ours decide what a pass makes: its own and all that it imports, so that a key changes with them alone.

Imports inside functions count like those at the top (a tool is imported where it is used, for it brings torch), those
for type checkers do not. They are found without importing anything, from the syntax trees of the import statements; the
tree of a whole file takes ten times as long, and a start from the cache makes every key anew.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from textwrap import dedent

PACKAGE = "leanserve"
FOR_TYPE_CHECKERS = re.compile(r"^([ \t]*)if TYPE_CHECKING:\n(?:\1[ \t]+.*\n|[ \t]*\n)*", re.MULTILINE)
STATEMENT = re.compile(
    rf"^[ \t]*(?:from {PACKAGE}[\w.]* import (?:\([^)]*\)|[^(\n]*)|import {PACKAGE}\b[^\n]*)$", re.MULTILINE
)


@cache
def closure_digest(file: Path, root: Path) -> str:
    """sha256 over the content of `file` and of every module below `root`, our package's folder, that it leads to."""
    digest = hashlib.sha256()
    for source in sorted(source_closure(file, root)):
        digest.update(_content(source).encode())
    return digest.hexdigest()


def source_closure(file: Path, root: Path) -> frozenset[Path]:
    """`file` and all that it imports of ours, directly or through others."""
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        source = waiting.pop()
        if source not in found:
            found.add(source)
            waiting.extend(_imported(source, root))
    return frozenset(found)


@cache
def _content(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@cache
def _imported(file: Path, root: Path) -> tuple[Path, ...]:
    statements = STATEMENT.findall(FOR_TYPE_CHECKERS.sub("", _content(file)))
    tree = ast.parse("\n".join(dedent(statement) for statement in statements))
    return tuple(source for node in tree.body for source in _files_of(node, root))


def _files_of(node: ast.stmt, root: Path) -> Iterator[Path]:
    """Where the modules of an import statement are. A package above a module decides nothing, and does not count."""
    if isinstance(node, ast.Import):
        names = [(alias.name, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
    else:
        return
    for part, whole in names:
        yield _module(part, root) or _module(whole, root) or root / "__init__.py"


@cache
def _module(name: str, root: Path) -> Path | None:
    """The file of a module or of a package; `None`: there is none of this name."""
    path = root.joinpath(*name.split(".")[1:])
    candidates = (path.with_name(f"{path.name}.py"), path / "__init__.py")
    return next((candidate for candidate in candidates if candidate.is_file()), None)
