from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from leanserve.contracts import ModelSpec, OnnxModel, TensorSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.families.runtime.channels_last import ChannelsLast
from tiny_base import IMAGES, TinyNet, context_of, lively, tiny_base


def is_channels_last(module: nn.Module) -> bool:
    weight = module.get_parameter("conv.weight")
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_kernels_change_their_layout_and_answers_do_not_change(tmp_path: Path) -> None:
    model = TorchModel(lively(TinyNet(), seed=3), IMAGES)
    applied = ChannelsLast().apply(model, context_of(tiny_base(), tmp_path))
    assert isinstance(applied.model, TorchModel)
    images = torch.from_numpy(tiny_base().inputs[0])
    assert is_channels_last(applied.model.module)
    assert not is_channels_last(model.module)
    assert torch.allclose(applied.model.module(images), model.module(images), atol=1e-5)
    assert applied.facts["speedup"] > 0


def test_weights_stored_channels_first_load_into_the_layout(tmp_path: Path) -> None:
    model = TorchModel(lively(TinyNet(), seed=3), IMAGES)
    applied = ChannelsLast().apply(model, context_of(tiny_base(), tmp_path))
    stored = {name: value.contiguous() for name, value in copy.deepcopy(model.module).state_dict().items()}
    again = ChannelsLast().rebuild_structure(lively(TinyNet(), seed=9), applied.decisions)
    again.load_state_dict(stored, strict=True)
    assert is_channels_last(again)
    assert isinstance(applied.model, TorchModel)
    images = torch.from_numpy(tiny_base().inputs[0])
    assert torch.equal(again(images), applied.model.module(images))


def test_models_without_images_or_kernels_are_refused(tmp_path: Path) -> None:
    context = context_of(tiny_base(), tmp_path)
    vectors = ModelSpec((TensorSpec("values", "float32", (4,)),), IMAGES.outputs)
    with pytest.raises(PassFailed, match="takes no images"):
        ChannelsLast().apply(TorchModel(nn.Linear(4, 2), vectors), context)
    with pytest.raises(PassFailed, match="has no 2-D convolutions"):
        ChannelsLast().apply(TorchModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), IMAGES), context)
    with pytest.raises(PassFailed, match="drop the pass"):
        ChannelsLast().apply(OnnxModel(tmp_path / "model.onnx", IMAGES), context)
