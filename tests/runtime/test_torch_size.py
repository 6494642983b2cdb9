"""MACs against hand counts, fused kernels included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leanserve.contracts import ModelSpec, TensorSpec, TorchModel
from leanserve.passes.toolkit.layer_calls import positions, trace_calls
from leanserve.runtime.formats.torch_size import count_macs, count_parameters
from structural_nets import Mobile, image_base

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Linear(10, 20), (10,), 200),
        (nn.Linear(10, 20), (None, 10), 16 * 200),
        (nn.Conv2d(8, 16, 3, padding=1, groups=4), (8, 10, 10), 100 * 16 * 2 * 9),
        (nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=8), (8, 10, 10), 25 * 8 * 9),
        (nn.Conv1d(4, 6, 5), (4, 20), 16 * 6 * 4 * 5),
        (nn.LSTM(8, 16, batch_first=True), (None, 8), 16 * 4 * 16 * 24),
        (
            nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
            (None, 32),
            16 * 32 * 32 * 4 + 16 * 32 * 64 * 2 + 2 * 16 * 16 * 32,
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_macs_per_row(module: nn.Module, shape: tuple[int | None, ...], macs: int) -> None:
    model = TorchModel(module.eval(), ModelSpec((TensorSpec("x", "float32", shape),), ()))
    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    assert count_macs(model) == macs
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert torch.backends.mkldnn.enabled == onednn


def test_a_shared_tensor_counts_once() -> None:
    layer = nn.Linear(4, 4)
    model = TorchModel(nn.Sequential(layer, layer), ModelSpec((TensorSpec("x", "float32", (4,)),), ()))
    assert count_parameters(model) == 20
    assert count_macs(model) == 32
    calls = trace_calls(model, {"0": layer})["0"]
    assert len(calls) == 2
    assert positions(calls, channel_axis=-1) == 2


def test_the_sum_over_layers_is_the_whole() -> None:
    base = image_base(Mobile())
    model = TorchModel(base.torch_module(), base.spec)
    convs = {name: child for name, child in model.module.named_modules() if isinstance(child, nn.Conv2d)}
    calls = trace_calls(model, convs)
    total = sum(positions(calls[name], channel_axis=-3) * conv.weight.numel() for name, conv in convs.items())
    assert count_macs(model) == total + model.module.get_parameter("head.weight").numel()
