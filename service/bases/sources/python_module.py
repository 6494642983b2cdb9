"""`base: {python: package.module:factory}`: a torch module of the user's own.

The factory is found beside the config file or among what is installed; only the person who starts the service can name
it. The fingerprint follows the factory's file and every module that it imports from the same folder.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.bases.checkpoints import file_digest, load_weights
from service.bases.declaration import PythonBase
from service.bases.description import Description, Tensor
from service.bases.inputs import declared_inputs, described
from service.bases.tracing import traced_outputs
from service.contracts import InputSpec, TorchModel
from service.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class PythonSource:
    """A `bases.opening.Source`."""

    declared: PythonBase
    folder: Path

    def fingerprint(self) -> str:
        total = hashlib.sha256()
        for path in sorted(own_sources(self._file())):
            total.update(f"{path.name} {file_digest(path)}\n".encode())
        total.update(json.dumps(dict(self.declared.arguments), sort_keys=True).encode())
        if self.declared.weights is not None:
            total.update(file_digest(self.folder / self.declared.weights).encode())
        return total.hexdigest()

    def describe(self) -> Description:
        inputs = declared_inputs(self.declared) or self._declared_beside_factory()
        names = ("logits",) if self.declared.labels else ("embedding",) if self.declared.text else ("output",)
        outputs = traced_outputs(self._module(), inputs, names, self.declared.rows)
        return described(self.declared, self.folder, self._names()[0].rpartition(".")[2], inputs, outputs)

    def model(self, spec: InputSpec) -> TorchModel:
        return TorchModel(self._module(), spec)

    def _module(self) -> nn.Module:
        """A fresh module with its weights, in eval mode."""
        import torch

        module_name, factory_name = self._names()
        factory = getattr(self._imported(), factory_name, None)
        if not callable(factory):
            raise ConfigError(f"base.python: the module {module_name} has no function {factory_name}")
        try:
            module = factory(**self.declared.arguments)
        except Exception as error:  # whatever the user's code raises
            raise ConfigError(f"base.python: {self.declared.python} failed: {type(error).__name__}: {error}") from error
        if not isinstance(module, torch.nn.Module):
            raise ConfigError(
                f"base.python: {self.declared.python} returned a {type(module).__name__}, no torch module"
            )
        if self.declared.weights is not None:
            load_weights(module, self.folder / self.declared.weights)
        return module.float().eval()

    def _declared_beside_factory(self) -> tuple[Tensor, ...]:
        """`INPUTS` of the module that has the factory: one mapping of name, dtype and shape per input."""
        declared = getattr(self._imported(), "INPUTS", None)
        if declared is None:
            raise ConfigError(
                "base: the input of the model is not known; declare base.image (pictures), base.text (token ids) or "
                f"base.inputs (any tensors), or INPUTS in {self._names()[0]}"
            )
        return tuple(Tensor.model_validate(item) for item in declared)

    def _imported(self) -> Any:
        name = self._names()[0]
        self._file()
        try:
            return import_module(name)
        except Exception as error:  # a user's module may raise anything
            raise ConfigError(f"base.python: importing {name} failed: {type(error).__name__}: {error}") from error

    def _file(self) -> Path:
        """The file of the factory's module, found without running the module itself."""
        name = self._names()[0]
        folder = str(self.folder.resolve())
        if folder not in sys.path:
            sys.path.insert(0, folder)
        try:
            spec = find_spec(name)
        except ModuleNotFoundError:
            spec = None
        if spec is None or spec.origin is None:
            raise ConfigError(f"base.python: there is no module {name}, neither in {self.folder} nor installed")
        return Path(spec.origin)

    def _names(self) -> tuple[str, str]:
        module, _, factory = self.declared.python.partition(":")
        return module, factory


def own_sources(file: Path) -> set[Path]:
    """A Python file and, transitively, those it imports that lie in its folder; read from the syntax, nothing runs."""
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        waiting += [near for name in _imports(path) if (near := _beside(file.parent, name)) is not None]
    return found


def _imports(path: Path) -> set[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise ConfigError(f"base.python: {path}:{error.lineno}: {error.msg}") from error
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or alias.name for alias in node.names}
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module}
    return names


def _beside(folder: Path, name: str) -> Path | None:
    """The file of an imported module if it lies in the folder; `package.module` is also found from inside `package`."""
    parts = name.split(".")
    for start in range(len(parts)):
        path = folder.joinpath(*parts[start:])
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None
