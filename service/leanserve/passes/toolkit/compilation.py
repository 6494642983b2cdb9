"""A torch module compiled for the row counts that serving uses, which never falls back to eager without a word.

`torch.compile` on its own recompiles when something it guarded on changes, and after eight times it silently runs
eager: a variant would slow down in production and nobody would know. Here each shape is one graph, compiled once, at
its first batch (the warm-up); any further compilation is an error.
"""

from __future__ import annotations

import sysconfig
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from leanserve.contracts import ModelSpec
from leanserve.errors import PassFailed

Tensors: TypeAlias = tuple[torch.Tensor, ...]

DYNAMIC = 0
"""The key of the one graph for any number of rows above 1."""

MOST_GRAPHS = 1024
"""Graphs per forward method. Variants of one base share the method, so torch's default of 8 is soon used up."""


class RecompiledError(RuntimeError):
    """A compiled model met an input for which it would have to be compiled again."""


def require_compiler(kind: str) -> None:
    """Look for what inductor needs before it fails in the middle of a build.

    Raises:
        PassFailed: there is no compiler, or Python's headers are missing.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise PassFailed(f"{kind} needs a C++ compiler; install g++ (Debian: apt-get install g++)") from error
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise PassFailed(f"{kind} needs {header}; install Python's headers (Debian: apt-get install python3-dev)")


class CompiledModule(nn.Module):
    """`module` compiled for each number of rows in `buckets`, or for any number of rows if there are none.

    With buckets any batch is answered right: it is padded with zeros to the next bucket, or cut if it is larger than
    the largest. Compile and run it on one thread with the same thread count and under `torch.inference_mode`.
    """

    def __init__(self, module: nn.Module, spec: ModelSpec, buckets: Sequence[int], options: Mapping[str, Any]) -> None:
        super().__init__()
        self.inner = module
        self.row_buckets = tuple(sorted(buckets))
        self._spec = spec
        self._options = dict(options)
        self._graphs: dict[int, Callable[..., Any]] = {}

    @property
    def compilations(self) -> int:
        """Graphs that were compiled so far: one per row count, all of them at warm-up."""
        return len(self._graphs)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | Tensors:
        rows = len(inputs[0])
        if rows in self.row_buckets or not self.row_buckets:
            return self._run(inputs)
        largest = self.row_buckets[-1]
        parts = [self._padded(part) for part in zip(*(torch.split(item, largest) for item in inputs), strict=True)]
        joined = tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))
        return joined if len(joined) > 1 else joined[0]

    def _padded(self, inputs: Tensors) -> Tensors:
        rows = len(inputs[0])
        missing = next(bucket for bucket in self.row_buckets if bucket >= rows) - rows
        outputs = self._run(tuple(F.pad(item, (0, 0) * (item.ndim - 1) + (0, missing)) for item in inputs))
        return tuple(item[:rows] for item in (outputs if isinstance(outputs, tuple) else (outputs,)))

    def _run(self, inputs: Tensors) -> torch.Tensor | Tensors:
        rows = len(inputs[0])
        key = rows if self.row_buckets or rows == 1 else DYNAMIC
        graph = self._graphs.get(key)
        if graph is None:
            return self._first_run(key, inputs)
        try:
            return cast("torch.Tensor | Tensors", graph(*inputs))
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            shapes = ", ".join(str(tuple(item.shape)) for item in inputs)
            raise RecompiledError(
                f"the compiled model would have to be compiled again for inputs of shape {shapes}; "
                "was it compiled on this thread, with this number of threads?"
            ) from error

    def _first_run(self, key: int, inputs: Tensors) -> torch.Tensor | Tensors:
        """Compile by running. A graph counts only once it has run, so that a failure can be tried again."""
        if not self.row_buckets:
            self._mark_dynamic(inputs)

        def whole(*tensors: torch.Tensor) -> torch.Tensor | Tensors:
            # Not the module itself: torch would run its hooks (conversions of a cast model) outside of the graph.
            return cast("torch.Tensor | Tensors", self.inner(*tensors))

        lowering = _OneGraph(self._options)
        graph = torch.compile(whole, backend=lowering, fullgraph=True, dynamic=False)
        with torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS, accumulated_recompile_limit=MOST_GRAPHS):
            outputs = graph(*inputs)
        self._graphs[key] = graph
        return outputs

    def _mark_dynamic(self, inputs: Tensors) -> None:
        """Make it an error, at warm-up, if the model fixes an axis that must be free."""
        for item, tensor in zip(self._spec.inputs, inputs, strict=True):
            axes = [axis for axis, size in enumerate(item.shape, start=1) if size is None]
            for axis in axes if len(tensor) == 1 else [0, *axes]:
                torch._dynamo.mark_dynamic(tensor, axis)


class _OneGraph:
    """The inductor as a backend of dynamo that compiles once; the options hold for this graph only, not globally."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._done = False

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        if self._done:
            raise RecompiledError("compiled a second time")
        self._done = True
        return cast(Callable[..., Any], _inductor()(graph, inputs, config_patches=self._options))


def _inductor() -> Callable[..., Any]:
    with warnings.catch_warnings():
        # Importing the inductor defines a scripted module of torch's own, which torch itself has deprecated.
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
        from torch._inductor.compile_fx import compile_fx
    return compile_fx
