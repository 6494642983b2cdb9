"""`base: {torch_export: FILE.pt2}`: a program saved by torch.export, whose source is not needed.

It runs in torch and exports to ONNX, but it is a list of operators: there are no layers left that a pass could prune or
replace. What torch would run while reading such a file is taken out or refused (`exported_archive`).
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanserve.bases.axis_sizes import with_sizes
from leanserve.bases.checkpoints import file_digest
from leanserve.bases.description import Description, Tensor
from leanserve.bases.inputs import bounds_of, declared_inputs, described, served_name
from leanserve.bases.meanings import proven
from leanserve.bases.probing import probe, spec_of_inputs
from leanserve.bases.sources.exported_archive import safe_copy
from leanserve.bases.tracing import last_operators, runner
from leanserve.config.base_section import TorchExportBase
from leanserve.contracts import ModelSpec, RowsTogether, TorchModel
from leanserve.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from torch.export import ExportedProgram

LARGEST_BATCH = 32
"""Rows up to which every variant is measured."""
HOW_TO_EXPORT = "export it with dynamic_shapes=({0: torch.export.Dim.AUTO}, ...), one entry per input, in eval mode"


@dataclass(frozen=True)
class ExportedSource:
    """A `bases.origin.Source`."""

    declared: TorchExportBase
    folder: Path

    def fingerprint(self) -> str:
        """sha256 (hex) over the file and the version of torch that runs it."""
        return hashlib.sha256(f"torch=={metadata.version('torch')} {file_digest(self._path)}".encode()).hexdigest()

    def describe(self) -> Description:
        program = self._program()
        inputs = self._settled(_inputs(program, self._path, self.declared.rows))
        module, names = _module(program), _output_names(program)
        spec = spec_of_inputs(inputs, self.declared.rows, *bounds_of(self.declared))
        try:
            spec, sizes = with_sizes(runner(module), spec, names)
            found = probe(runner(module), spec, names)
        except ConfigError as error:
            raise ConfigError(f"base.torch_export: {self._path} cannot be served: {error}") from error
        operators = last_operators(module, spec, len(names))
        outputs = tuple(
            proven(output.model_copy(update={"name": ""}), operator)
            for output, operator in zip(found.outputs, operators, strict=True)
        )
        found = found.model_copy(update={"outputs": outputs, "caveats": sizes + found.caveats})
        return described(self.declared, self.folder, served_name(self._path), found)

    def model(self, spec: ModelSpec) -> TorchModel:
        return TorchModel(_module(self._program()), spec)

    @property
    def _path(self) -> Path:
        return self.folder / self.declared.torch_export

    def _program(self) -> ExportedProgram:
        import torch

        archive = safe_copy(self._path)
        talk = logging.getLogger("torch.export")
        level = talk.level
        talk.setLevel(logging.CRITICAL)  # it logs the stack of what it then raises
        try:
            program: ExportedProgram = torch.export.load(archive)
        except Exception as error:  # the deserialiser raises nearly anything on a program that it does not know
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise ConfigError(
                f"base.torch_export: torch {torch.__version__} cannot read {self._path} ({reason}); export it with "
                "this version"
            ) from error
        finally:
            talk.setLevel(level)
        _refuse_other_dtypes(program, self._path)
        return program

    def _settled(self, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The program's inputs; where the config declares some they must be the same, by position."""
        declared = declared_inputs(self.declared)
        if declared is None:
            return found
        told, wished = ([f"{item.dtype} {list(item.shape)}" for item in items] for items in (found, declared))
        if len(found) != len(declared) or any(not _fits(*pair) for pair in zip(found, declared, strict=True)):
            raise ConfigError(
                f"base: the config declares rows of {', '.join(wished)}; the program in {self._path} takes "
                f"{', '.join(told)}"
            )
        return declared


def _fits(found: Tensor, wished: Tensor) -> bool:
    same = found.dtype == wished.dtype and len(found.shape) == len(wished.shape)
    return same and all(has in {None, asked} for has, asked in zip(found.shape, wished.shape, strict=True))


def _inputs(program: ExportedProgram, path: Path, together: RowsTogether) -> tuple[Tensor, ...]:
    """Name, dtype and shape of one row per input, in the order in which the program takes them."""
    import torch

    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    names = program.graph_signature.user_inputs
    arguments, keywords = program.call_spec.in_spec.children()
    positional = not keywords.children() and all(item.is_leaf() for item in arguments.children())
    if not names or not positional or not all(isinstance(values.get(str(name)), torch.Tensor) for name in names):
        raise ConfigError(
            f"base.torch_export: {path} must take tensors only, by position, without lists, dicts and keywords around "
            f"them; it takes {', '.join(map(str, names)) or 'nothing'}. Wrap the model in a module whose forward does"
        )
    if together != "one":
        for name in names:
            _require_rows(str(name), values[str(name)], program, path)
    return tuple(_input(str(name), values[str(name)]) for name in names)


def _require_rows(name: str, value: Any, program: ExportedProgram, path: Path) -> None:
    """See that the first axis takes any number of rows."""
    rows = value.shape[0] if value.ndim else None
    if rows is None or isinstance(rows, int):
        raise ConfigError(
            f"base.torch_export: {path} takes '{name}' of shape {list(value.shape)}: its first axis must be dynamic, "
            f"because it counts the rows of a batch; {HOW_TO_EXPORT}. A program for a single row is served by "
            "base.rows: one"
        )
    allowed = program.range_constraints.get(rows.node.expr)
    # torch counts from 2 where it means from 1: 0 and 1 are special to its exporter.
    if allowed is not None and not (allowed.lower <= 2 and allowed.upper >= LARGEST_BATCH):
        raise ConfigError(
            f"base.torch_export: {path} takes {allowed.lower} to {allowed.upper} rows; batches have 1 to "
            f"{LARGEST_BATCH} and more. Without these limits: {HOW_TO_EXPORT}"
        )


def _input(name: str, value: Any) -> Tensor:
    shape = tuple(size if isinstance(size, int) else None for size in value.shape[1:])
    return Tensor(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=shape)


def _output_names(program: ExportedProgram) -> tuple[str, ...]:
    """What errors call the outputs before their meaning names them."""
    return tuple(f"output {index}" for index in range(len(program.graph_signature.user_outputs)))


def _refuse_other_dtypes(program: ExportedProgram, path: Path) -> None:
    for name, tensor in program.state_dict.items():
        if tensor.is_floating_point() and str(tensor.dtype) != "torch.float32":
            raise ConfigError(
                f"base.torch_export: {path} has '{name}' in {str(tensor.dtype).removeprefix('torch.')}; export it in "
                "float32: the variants are what makes it smaller"
            )


def _module(program: ExportedProgram) -> nn.Module:
    """The program as a module. It was exported in one mode and stays in it, so asking for a mode does nothing."""
    module = program.module().requires_grad_(requires_grad=False)

    def stay(*_: object) -> nn.Module:
        return module

    for part in module.modules():
        part.training = False
    vars(module).update(train=stay, eval=stay)
    return module
