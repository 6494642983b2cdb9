"""From a torch module to a package of machine code that answers the same, for any number of rows.

torch.export takes an axis of size 1 for a constant and compiles for 2 and more; told to be oblivious of sizes, it
compiles for 1 as well. The package is compared with the module at one row and at three before anyone uses it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config

from leanserve.comparison import largest_difference, largest_finite
from leanserve.contracts import ModelSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.toolkit.lowering import CHECKS, exported_program
from leanserve.runtime.formats.packaged_module import PackagedModule, TensorOutputs

TOLERANCE = 1e-3
"""Largest accepted difference, relative to the largest finite output, of a module in float32."""
NARROW_TOLERANCE = 0.05
"""The same in 16 bits, where fused loops round less often than operators one by one."""


def package(model: TorchModel, path: Path, *, freezing: bool) -> PackagedModule:
    """Compile a module into a package at `path`, and open it; `freezing` makes constants of its weights.

    Raises:
        PassFailed: it cannot be exported or compiled, or answers differently.
    """
    sizes: Any = torch.fx.experimental._config
    with sizes.patch(backed_size_oblivious=True):
        program = exported_program(model)
        _compile(program, path, freezing=freezing)
    made = PackagedModule(path)
    _check(model, made)
    return made


def _compile(program: torch.export.ExportedProgram, path: Path, *, freezing: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own internals while it compiles
        from torch._inductor import aoti_compile_and_package

        # The number of threads is the lane's, at every call, and not this machine's of today.
        settings = {"freezing": freezing, "cpp.dynamic_threads": True}
        with torch.no_grad():
            try:
                aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
            except Exception as error:  # the inductor has errors of many families
                reason = str(error).strip().splitlines() or [type(error).__name__]
                raise PassFailed(f"aot_inductor cannot compile the model: {reason[0]}") from error


def _check(model: TorchModel, made: PackagedModule) -> None:
    narrow = any(weight.dtype in {torch.bfloat16, torch.float16} for weight in model.module.parameters())
    tolerance = NARROW_TOLERANCE if narrow else TOLERANCE
    for most, length in CHECKS:
        rows = model.spec.most_rows(most)
        batch = [torch.from_numpy(array) for array in model.spec.example(rows, length, seed=rows)]
        with torch.inference_mode():
            expected, got = _each(model.module(*batch)), _each(made(*batch))
        _compare(model.spec, expected, got, tolerance)


def _each(outputs: TensorOutputs) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _compare(
    spec: ModelSpec, expected: tuple[torch.Tensor, ...], got: tuple[torch.Tensor, ...], tolerance: float
) -> None:
    for item, right, found in zip(spec.outputs, expected, got, strict=True):
        if right.shape != found.shape:
            raise PassFailed(
                f"compiled ahead, output '{item.name}' has shape {tuple(found.shape)}, not {tuple(right.shape)}"
            )
        worst = largest_difference(right.float().numpy(), found.float().numpy())
        if worst > tolerance * largest_finite(right.float().numpy()):
            raise PassFailed(f"compiled ahead, output '{item.name}' differs by {worst:.2e} at {len(right)} rows")
