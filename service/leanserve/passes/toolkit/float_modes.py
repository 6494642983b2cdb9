"""In what floats a part of a module computes, set on the module itself, so that whoever runs it need not know.

Hooks and wrapped `forward` methods rather than wrapping modules: the names of the weights stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

Forward = Callable[..., Any]


def bridge(module: nn.Module, inside: torch.dtype, outside: torch.dtype) -> None:
    """Convert the floats that go into a module to `inside` and those that come out to `outside`."""
    module.register_forward_pre_hook(_Convert(inside).before, with_kwargs=True)
    module.register_forward_hook(_Convert(outside).after)


def autocast(module: nn.Module, narrow: torch.dtype) -> None:
    """Let torch choose between `narrow` and float32 for every operation in a module; outputs are float32."""
    module.forward = _Within(module.forward, _Autocast(narrow, enabled=True))
    module.register_forward_hook(_Convert(torch.float32).after)


def float32_inside(module: nn.Module) -> None:
    """Compute a part of a module under `autocast` in float32."""
    module.register_forward_pre_hook(_Convert(torch.float32).before, with_kwargs=True)
    module.forward = _Within(module.forward, _Autocast(torch.float32, enabled=False))


def tf32(module: nn.Module, kept: Iterable[nn.Module]) -> None:
    """Let NVIDIA's tensor cores compute products of float32 with 10 bits of mantissa, in a module but for its parts.

    It is a setting of the process, made around the launches of the module's kernels. A model in float32 that launches
    its own meanwhile, from another thread, may get it too: a worker process of its own (`isolation`) keeps them apart.
    """
    module.forward = _Within(module.forward, _Tf32("tf32"))
    for layer in kept:
        layer.forward = _Within(layer.forward, _Tf32("ieee"))


class _Within:
    """A `forward` within a context that is made from its tensors."""

    def __init__(self, forward: Forward, context: Callable[[torch.device], AbstractContextManager[object]]) -> None:
        self.forward = forward
        self.context = context

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        devices = (item.device for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor))
        with self.context(next(devices, torch.device("cpu"))):
            return self.forward(*args, **kwargs)


class _Autocast:
    def __init__(self, dtype: torch.dtype, *, enabled: bool) -> None:
        self.dtype, self.enabled = dtype, enabled

    def __call__(self, device: torch.device) -> AbstractContextManager[object]:
        if not self.enabled:
            return torch.autocast(device.type, enabled=False)
        return torch.autocast(device.type, self.dtype)


class _Tf32:
    def __init__(self, precision: str) -> None:
        self.precision = precision

    @contextmanager
    def __call__(self, device: torch.device) -> Iterator[None]:  # noqa: ARG002 - it is a setting of all of them
        cudnn: Any = torch.backends.cudnn
        settings: tuple[Any, ...] = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
        before = [setting.fp32_precision for setting in settings]
        try:
            for setting in settings:
                setting.fp32_precision = self.precision
            yield
        finally:
            for setting, precision in zip(settings, before, strict=True):
                setting.fp32_precision = precision


class _Convert:
    """Forward hooks that convert float tensors, in containers too; integers (token ids, masks) pass untouched."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def before(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        return self._each((args, kwargs))

    def after(self, _: nn.Module, __: Any, outputs: Any) -> Any:
        return self._each(outputs)

    def _each(self, values: Any) -> Any:
        return tree_map(self._converted, values)

    def _converted(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
