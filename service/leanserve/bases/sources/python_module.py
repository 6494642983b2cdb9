"""`base: {python: package.module:factory}`: a torch module of the user's own.

The factory is found beside the config file or among what is installed; only the person who starts the service can name
it. The folder of the config file comes last on the path: a `queue.py`, `torch.py` or `models/` in it must not take the
place of Python's, torch's or ours.

The factory may read anything, so nothing short of calling it tells which model it makes: the fingerprint is made of
what the module holds, of the user's code that made it, and of the arguments.

A factory that draws its weights from torch, numpy or random without a seed gets the same ones every time. One that has
them from elsewhere, and makes another model in every process, is refused: none of its measurements would be true.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from leanserve import child
from leanserve.bases.checkpoints import file_digest, load_weights
from leanserve.bases.description import Description, Tensor
from leanserve.bases.fitting import shortened
from leanserve.bases.inputs import bounds_of, declared_inputs, described
from leanserve.bases.probing import spec_of_inputs
from leanserve.bases.sources.python_imports import Imports, make_findable, make_torchvision_importable
from leanserve.bases.tracing import sized, traced
from leanserve.config.base_section import PythonBase
from leanserve.contracts import Json, ModelSpec, TorchModel
from leanserve.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from leanserve.bases.modules.held_state import Held

SEED = 0


@dataclass(frozen=True)
class PythonSource:
    """A `bases.origin.Source`."""

    declared: PythonBase
    folder: Path
    known: str | None = None
    """The fingerprint that another process has found; a module that has another one is refused."""
    _first: list[Held] = field(default_factory=list, init=False, repr=False, compare=False)
    """What the first module of this process held."""

    def fingerprint(self) -> str:
        """sha256 (hex) over the factory, its arguments, the user's code behind it, and what the module holds."""
        if self.known is not None:
            return self.known
        if not self._first:
            self._checked(self._module()[0])
        return self._fingerprint(self._first[0])

    def describe(self) -> Description:
        from leanserve.bases.modules.held_state import unlike
        from leanserve.bases.modules.named_inputs import take_by_name

        inputs = declared_inputs(self.declared) or self._declared_beside_factory()
        module, caveats = self._module()
        take_by_name(self._checked(module), [item.name for item in inputs])
        spec, sizes = sized(module, spec_of_inputs(inputs, self.declared.rows, *bounds_of(self.declared)))
        found = traced(module, spec)
        drawn = unlike(self._first[0].inside, self._held(self._module(SEED + 1)[0]).inside)
        if drawn:
            caveats += (f"weights drawn at random ({shortened(drawn)})",)
        found = found.model_copy(update={"caveats": caveats + sizes + found.caveats})
        return described(self.declared, self.folder, self._names()[0].rpartition(".")[2], found)

    def model(self, spec: ModelSpec) -> TorchModel:
        """The model; whatever its module returns, it gives tensors.

        Raises:
            ConfigError: it is not the one of the fingerprint.
        """
        import torch

        from leanserve.bases.modules.named_inputs import take_by_name
        from leanserve.bases.modules.tensor_outputs import give_tensors

        module = take_by_name(self._checked(self._module()[0]), [item.name for item in spec.inputs])
        example = map(torch.from_numpy, spec.example(spec.most_rows(2)))
        return TorchModel(give_tensors(module, *example), spec)

    def _module(self, seed: int = SEED) -> tuple[nn.Module, tuple[str, ...]]:
        """A fresh module with its weights, in eval mode; and what everyone must know of these."""
        import torch

        module_name, factory_name = self._names()
        with _seeded(seed):
            factory = getattr(self._imported(), factory_name, None)
            if not callable(factory):
                raise ConfigError(f"base.python: the module {module_name} has no function {factory_name}")
            try:
                module = factory(**self.declared.arguments)
            except (Exception, SystemExit) as error:  # whatever the user's code raises
                reason = f"{type(error).__name__}: {error}"
                raise ConfigError(f"base.python: {self.declared.python} failed: {reason}") from error
        if not isinstance(module, torch.nn.Module):
            raise ConfigError(
                f"base.python: {self.declared.python} returned a {type(module).__name__}, no torch module"
            )
        module = module.float().eval()
        if self.declared.weights is None:
            return module, ()
        return module, load_weights(module, self.folder / self.declared.weights, self.declared.weights_key)

    def _checked(self, module: nn.Module) -> nn.Module:
        """The same module, if it holds what the first one of this process held, and that one what was known of it."""
        from leanserve.bases.modules.held_state import unlike

        held = self._held(module)
        if not self._first:
            self._first.append(held)
            if self.known not in {None, self._fingerprint(held)}:
                raise ConfigError(
                    f"base.python: {self.declared.python} makes another model in every process, or its files have "
                    "changed meanwhile; have it make the same one every time (seed every generator of its own)"
                )
        if different := unlike(self._first[0].inside, held.inside):
            raise ConfigError(
                f"base.python: {self.declared.python} makes another model every time, or its files have changed "
                f"meanwhile: {shortened(different)} differ; seed every generator of its own, and keep out of the "
                "module what changes by itself"
            )
        return module

    def _held(self, module: nn.Module) -> Held:
        from leanserve.bases.modules.held_state import held_by

        return held_by(module, self._imports.is_own)

    def _fingerprint(self, held: Held) -> str:
        total = hashlib.sha256(f"{self.declared.python} {held.digest}\n".encode())
        total.update(json.dumps(dict(self.declared.arguments), sort_keys=True).encode())
        for name, path in sorted(self._imports.files.items()):
            total.update(f"{name} {file_digest(path)}\n".encode())
        for library, version in self._imports.libraries.items():
            total.update(f"{library}=={version}\n".encode())
        for digest in self._contents(dict(self.declared.arguments)):
            total.update(f"{digest}\n".encode())
        return total.hexdigest()

    def _contents(self, value: Json) -> Iterator[str]:
        """Digests of the files that arguments name, as seen from the config file or from where the service was started.

        Of folders nothing is taken: they may hold what changes by itself, and what was read from them is held.
        """
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from self._contents(item)
        elif isinstance(value, str):
            yield from (file_digest(place) for place in (self.folder / value, Path(value)) if _is_file(place))

    @cached_property
    def _imports(self) -> Imports:
        self._find()
        return Imports(self._names()[0])

    def _declared_beside_factory(self) -> tuple[Tensor, ...]:
        """`INPUTS` of the module that has the factory: one mapping of name, dtype and shape per input."""
        declared = getattr(self._imported(), "INPUTS", None)
        if declared is None:
            raise ConfigError(
                "base: the input of the model is not known; declare base.image (images), base.text (token ids), "
                f"base.audio (samples) or base.inputs (any tensors), or INPUTS in {self._names()[0]}"
            )
        return tuple(Tensor.model_validate(item) for item in declared)

    def _imported(self) -> Any:
        name = self._names()[0]
        self._find()
        make_torchvision_importable()
        try:
            return import_module(name)
        except SyntaxError as error:
            place = f"{error.filename}:{error.lineno}" if error.filename else name
            raise ConfigError(f"base.python: {place}: {error.msg}") from error
        except (Exception, SystemExit) as error:  # a user's module may raise anything
            reason = f"{type(error).__name__}: {error}{_taken(error)}"
            raise ConfigError(f"base.python: importing {name} failed: {reason}") from error

    def _find(self) -> None:
        """Make sure that the factory's module can be imported, and is no module of Python's."""
        name = self._names()[0]
        make_findable(name, self.folder, "base.python")
        if name.partition(".")[0] in sys.stdlib_module_names:
            raise ConfigError(
                f"base.python: {name} is a module of Python's own, and nothing in it makes a torch module; name a "
                "factory of yours as package.module:factory"
            )

    def _names(self) -> tuple[str, str]:
        module, _, factory = self.declared.python.partition(":")
        return module, factory


def _is_file(place: Path) -> bool:
    try:
        return place.is_file()
    except OSError:  # a text that is too long for a path
        return False


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """With the generators that all code of a process shares at a known place; afterwards they are where they were."""
    import torch

    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def _taken(error: BaseException) -> str:
    """Why a module beside the config file was not found that has a place in a package called as one of ours."""
    owner = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or owner not in child.PACKAGES:
        return ""
    return f" ({owner} is a package of leanserve's; give yours another name)"
