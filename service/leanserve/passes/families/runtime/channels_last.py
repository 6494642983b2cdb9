"""Store images channel by channel within each pixel (NHWC), the order in which convolution kernels compute anyway.

With channels-first tensors every convolution of the CPU and tensor-core libraries reorders its input and its output;
with channels-last weights the first one does it for all. It changes no answer beyond float rounding and costs nothing
where all layers follow; layers without such a kernel reorder back, which is why the pass measures what it gains. Only
torch runs in this layout: an ONNX runtime chooses its own, so exporting afterwards is allowed and forgets this pass.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from leanserve.contracts import BuildContext, Json, Model
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied, Pass, Stage, Tag
from leanserve.passes.toolkit.timing import inference, seconds_per_call
from leanserve.runtime.formats.expected import torch_model

if TYPE_CHECKING:
    from torch import nn

ROWS = 8
"""Rows in the measured batch."""


class ChannelsLast(Pass):
    """Put the weights of 2-D convolutions into channels-last memory format; the torch backend feeds images likewise."""

    kind: Literal["channels_last"] = "channels_last"

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module"})
    forbids: ClassVar[frozenset[Tag]] = frozenset({"runtime"})
    stage: ClassVar[Stage] = Stage.LAYOUT_AND_RUNTIME

    def apply(self, model: Model, context: BuildContext) -> Applied:
        import torch

        model = torch_model(model, self.kind)
        images = [item.name for item in model.spec.inputs if len(item.shape) == 3]
        kernels = [weight for weight in model.module.parameters() if weight.ndim == 4]
        if not images or not kernels:
            lack = "takes no images (C, H, W)" if not images else "has no 2-D convolutions"
            raise PassFailed(f"channels_last: the model {lack}; drop the pass")
        module = self.rebuild_structure(copy.deepcopy(model.module), {})
        rows = model.spec.most_rows(ROWS)
        first = tuple(torch.from_numpy(array) for array in model.spec.example(rows, seed=context.seed))
        last = tuple(item.contiguous(memory_format=torch.channels_last) if item.ndim == 4 else item for item in first)
        with inference(context.threads):
            seconds = seconds_per_call({"before": lambda: model.module(*first), "after": lambda: module(*last)})
        return Applied(replace(model, module=module), facts={"speedup": seconds["before"] / seconds["after"]})

    def rebuild_structure(self, module: nn.Module, decisions: Mapping[str, Json]) -> nn.Module:  # noqa: ARG002
        import torch

        # Not `module.to(memory_format=...)`, which torch's type stubs do not know.
        for weight in [*module.parameters(), *module.buffers()]:
            if weight.ndim == 4:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        return module
