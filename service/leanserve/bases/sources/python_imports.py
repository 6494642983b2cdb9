"""Which Python files a module is made of: those of the user's own that it imports, directly or through others.

Read from the syntax and resolved as Python resolves names, so that nothing runs. A file is the user's own unless it is
of the standard library or installed among the libraries; of an installed package that brings the factory itself, all
files are. Of other libraries the names are told, because their versions decide answers too.

One library needs help before anybody imports it: torchvision next to a torch of another build. Its wheel on the package
index is built for CUDA; beside a torch for CPUs, its compiled part cannot be loaded, and importing the rest fails with
`operator torchvision::nms does not exist`, because it registers shapes for operators that nobody has declared.
Declaring them is enough: the operators belong to object detection, and no model that is served here calls them.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.util import find_spec, resolve_name
from pathlib import Path

from leanserve.errors import ConfigError
from leanserve.hardware import library_version

LIBRARY_FOLDERS = frozenset({"site-packages", "dist-packages"})
DETECTION = ("nms", "qnms")
"""Operators that torchvision's compiled part brings."""
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
STANDARD = tuple(Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib"))


@dataclass(frozen=True)
class Imports:
    """What the module `root` imports."""

    root: str

    @cached_property
    def _found(self) -> tuple[dict[str, Path], set[str]]:
        """Files of the user's own modules by name, and the first names of libraries."""
        files: dict[str, Path] = {}
        libraries: set[str] = set()
        seen: set[str] = set()
        waiting = [self.root]
        while waiting:
            name = waiting.pop()
            first = name.partition(".")[0]
            if name in seen or first in libraries:
                continue
            seen.add(name)
            spec = spec_of(name)
            if spec is None:
                continue
            file = Path(spec.origin) if spec.has_location and spec.origin else None
            if file is None:
                waiting += _parents(name)  # a package without a file, or a built-in module
            elif self._is_own_file(name, file):
                files[name] = file
                is_package = spec.submodule_search_locations is not None
                waiting += [*_parents(name), *_imported(file, name, is_package=is_package)]
            elif not _is_standard(file):
                libraries.add(first)
        return files, libraries

    @property
    def files(self) -> dict[str, Path]:
        """The user's own files, by the name of the module."""
        return self._found[0]

    @cached_property
    def libraries(self) -> dict[str, str]:
        """Installed libraries that these files import, with their versions; torch always."""
        return {name: _version(name) for name in sorted({*self._found[1], "torch"})}

    def is_own(self, name: str) -> bool:
        """Whether a module is the user's own, also one that no file names when it imports it."""
        if name in self.files:
            return True
        file = getattr(sys.modules.get(name), "__file__", None)
        return file is not None and self._is_own_file(name, Path(file))

    def _is_own_file(self, name: str, file: Path) -> bool:
        if name.partition(".")[0] == self.root.partition(".")[0]:
            return True
        return not LIBRARY_FOLDERS.intersection(file.resolve().parts) and not _is_standard(file)


def _is_standard(file: Path) -> bool:
    """Whether a file is of the standard library; libraries are installed below it."""
    path = file.resolve()
    return any(map(path.is_relative_to, STANDARD)) and not LIBRARY_FOLDERS.intersection(path.parts)


def spec_of(name: str) -> ModuleSpec | None:
    """Where a module is, without importing the packages around it; `None`: nowhere, such as for a name in a module."""
    parent = name.rpartition(".")[0]
    try:
        if not parent:
            return find_spec(name)
        around = spec_of(parent)
        if around is None or around.submodule_search_locations is None:
            return None
        found = (finder.find_spec(name, around.submodule_search_locations) for finder in sys.meta_path)
        return next((spec for spec in found if spec is not None), None)
    except (ImportError, ValueError, AttributeError):
        return None


def make_findable(name: str, folder: Path, key: str) -> None:
    """Make sure that a module can be imported, and that it is the one in `folder`, that of the config, if any.

    Raises:
        ConfigError: there is none, or another one of the same name comes first; the text starts with `key`.
    """
    folder = folder.resolve()
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    spec = spec_of(name)
    found = None if spec is None or spec.origin is None else Path(spec.origin)
    own = _file_of(folder, name.split("."))
    if own is not None and (found is None or found.resolve() != own.resolve()):
        owner = name.partition(".")[0]
        raise ConfigError(
            f"{key}: {own} cannot be imported as {name}: a module of Python, of leanserve or of an installed "
            f"package is called {owner}, too; give yours another name"
        )
    if found is None:
        raise ConfigError(f"{key}: there is no module {name}, neither in {folder} nor installed")


def _file_of(folder: Path, parts: Sequence[str]) -> Path | None:
    path = folder.joinpath(*parts)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _imported(file: Path, name: str, *, is_package: bool) -> Iterator[str]:
    """Absolute names of what a file may import; some are no modules, but names in one."""
    if file.suffix != ".py":
        return
    package = name if is_package else name.rpartition(".")[0]
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError as error:
        raise ConfigError(f"base.python: {file}:{error.lineno}: {error.msg}") from error
    except OSError as error:
        raise ConfigError(f"base.python: cannot read {file}: {error.strerror}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            try:
                origin = resolve_name(start, package) if node.level else start
            except ImportError:
                continue  # beyond the outermost package: Python refuses it too
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            yield from _imported_by_call(node)
        elif is_package and isinstance(node, ast.Assign) and "__all__" in map(_identifier, node.targets):
            # `from package import *` imports the modules that are named here.
            yield from (f"{name}.{entry}" for entry in _strings(node.value))


def _imported_by_call(node: ast.Call) -> Iterator[str]:
    """`import_module("name")`."""
    called = node.func.attr if isinstance(node.func, ast.Attribute) else _identifier(node.func)
    if called in {"import_module", "__import__"} and node.args:
        yield from _strings(node.args[0])


def _identifier(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _strings(node: ast.expr) -> Iterator[str]:
    inner = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
    return (value for value in inner if isinstance(value, str))


def _version(name: str) -> str:
    """Of the distributions that bring a module of this name."""
    if (version := library_version(name)) is not None:
        return version
    brought_by = metadata.packages_distributions().get(name, [])
    return " ".join(f"{one}=={metadata.version(one)}" for one in sorted(set(brought_by))) or "absent"


def make_torchvision_importable() -> None:
    """Declare the operators that torchvision's compiled part should bring, if it is installed and cannot.

    It is not imported: call this before libraries and modules of users, which may import it or not.
    """
    import torch

    found = find_spec("torchvision")
    if found is None or found.origin is None or hasattr(torch.ops.torchvision, DETECTION[0]):
        return
    compiled = (Path(found.origin).with_name(f"_C{suffix}") for suffix in EXTENSION_SUFFIXES)
    try:
        torch.ops.load_library(next(path for path in compiled if path.is_file()))  # type: ignore[no-untyped-call]
    except (OSError, StopIteration):
        for operator in DETECTION:
            torch.library.define(f"torchvision::{operator}", SCHEMA)
