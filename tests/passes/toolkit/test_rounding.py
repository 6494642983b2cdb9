"""Which way weights are rounded, against all ways there are, and against layers run as layers."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from leanserve.contracts import TorchModel
from leanserve.passes.toolkit.calibration import Recording
from leanserve.passes.toolkit.onnx_graph import fused_graph
from leanserve.passes.toolkit.rounding import adaround, as_matrix, input_moments
from structural_nets import Mobile, image_base
from tiny_base import context_of

RANDOM = np.random.default_rng(0)


def test_no_single_weight_is_better_turned_and_few_ways_are_better_at_all() -> None:
    inputs = RANDOM.standard_normal((200, 3)) @ RANDOM.standard_normal((3, 10))
    moments = inputs.T @ inputs + 0.05 * np.eye(10)
    wanted = RANDOM.uniform(-5, 5, (4, 10))
    found = adaround(wanted, np.ones((4, 1)), moments, 127)
    assert (np.abs(found - wanted) < 1).all()
    for row, ours in zip(wanted, found, strict=True):
        ways = np.floor(row) + np.array(list(product((0, 1), repeat=10)))
        errors = (((ways - row) @ moments) * (ways - row)).sum(1)
        own, near = (float((item - row) @ moments @ (item - row)) for item in (ours, np.rint(row)))
        assert own <= near
        assert (errors < own - 1e-9).mean() < 0.05
        for place in range(10):
            other = ours.copy()
            other[place] = 2 * np.floor(row[place]) + 1 - ours[place]
            assert float((other - row) @ moments @ (other - row)) >= own - 1e-9


def test_the_moments_are_of_what_each_layer_multiplies_grouped_and_depthwise_too(tmp_path: Path) -> None:
    base = image_base(Mobile())
    graph = fused_graph(TorchModel(base.torch_module(), base.spec), tmp_path)
    context = context_of(base, tmp_path)
    sources = list(dict.fromkeys(node.input[0] for node in graph.layers))
    recording = Recording(graph.model, base.spec, sources, base.data("calibration", 9), 4, 1)
    found = input_moments(graph, graph.layers, recording, context)
    outputs = Recording(graph.model, base.spec, [node.output[0] for node in graph.layers], recording.data, 9, 1)
    [(_, given)] = outputs.play()
    for node in graph.layers:
        weight = as_matrix(graph, node)
        moments = found[node.name]
        bias = onnx.numpy_helper.to_array(graph.constants[node.input[2]]).astype(np.float64)
        values = given[node.output[0]].astype(np.float64)
        values = values - (bias[:, None, None] if node.op_type == "Conv" else bias)
        energy = (values**2).sum((0, 2, 3) if node.op_type == "Conv" else 0)
        groups = len(moments) if moments.ndim == 3 else 1
        parts = weight.reshape(groups, -1, weight.shape[1])
        told = np.einsum("goi,gij,goj->go", parts, moments.reshape(groups, weight.shape[1], -1), parts).ravel()
        np.testing.assert_allclose(told, energy, rtol=1e-3)


@pytest.mark.parametrize("groups", [1, 2])
def test_outputs_lose_less_than_by_the_nearest(groups: int) -> None:
    layer = nn.Conv2d(8, 8, 3, groups=groups, bias=False)
    rows = torch.from_numpy(RANDOM.standard_normal((16, 2, 9, 9)) @ np.ones((9, 9)) / 9).float()
    images = rows.repeat(1, 4, 1, 1) + 0.1 * torch.randn(16, 8, 9, 9, generator=torch.Generator().manual_seed(0))
    patches = nn.functional.unfold(images, 3).reshape(16, groups, -1, 49).permute(1, 2, 0, 3).flatten(2).double()
    moments = (patches @ patches.mT).numpy()
    weight = layer.weight.detach().flatten(1).double().numpy()
    scales = np.abs(weight).max(1, keepdims=True) / 7
    errors = []
    for whole in (
        adaround(weight / scales, scales, moments if groups > 1 else moments[0], 7),
        np.rint(weight / scales),
    ):
        with torch.no_grad():
            kernel = torch.from_numpy(whole * scales).float().reshape(layer.weight.shape)
            given = nn.functional.conv2d(images, kernel, groups=groups)
            errors.append(float((given - layer(images)).square().mean()))
    assert errors[0] < 0.6 * errors[1]
