"""Adapters are folded in by the formula of PEFT, into the layers they name and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from leanserve.contracts import TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.families.merge.merge_lora import MergeLora
from lora_files import lora_tensors, write_lora
from structural_nets import Residual, image_base
from tiny_base import TinyBase, context_of


@pytest.fixture(scope="module")
def base() -> TinyBase:
    return image_base(Residual())


def folded(base: TinyBase, folder: Path, tensors: dict[str, torch.Tensor] | None = None, **settings: Any) -> TorchModel:
    options = write_lora(folder, lora_tensors() if tensors is None else tensors, **settings)
    made = MergeLora.model_validate(options).apply(base.model(), context_of(base, folder)).model
    assert isinstance(made, TorchModel)
    return made


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 4.0), ({"use_rslora": True}, 8 / 2**0.5), ({"alpha_pattern": {"head": 2, "conv1": 2}}, 1.0)],
)
def test_a_layer_answers_as_with_its_adapter_beside_it(
    base: TinyBase, settings: Any, scale: float, tmp_path: Path
) -> None:
    made, adapter = folded(base, tmp_path, **settings).module, lora_tensors()
    down, up = (adapter[f"base_model.model.head.lora_{side}.weight"] for side in "AB")
    x = torch.randn(3, 96)
    beside = base.teacher.get_submodule("head")(x) + scale * F.linear(F.linear(x, down), up)
    torch.testing.assert_close(made.get_submodule("head")(x), beside)
    down, up = (adapter[f"base_model.model.conv1.lora_{side}.weight"] for side in "AB")
    image = torch.randn(2, 48, 6, 6)
    wanted = base.teacher.get_submodule("conv1")(image) + scale * F.conv2d(F.conv2d(image, down, padding=1), up)
    torch.testing.assert_close(made.get_submodule("conv1")(image), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(made.get_parameter("conv2.weight"), base.teacher.get_parameter("conv2.weight"))


def test_the_adapted_model_may_stand_inside_the_base(base: TinyBase, tmp_path: Path) -> None:
    tensors = {
        "base_model.model.0.lora_A.weight": torch.ones(2, 3, 3, 3),
        "base_model.model.0.lora_B.weight": torch.ones(48, 2, 1, 1),
    }
    made = folded(base, tmp_path, tensors)
    change = made.module.get_parameter("stem.0.weight") - base.teacher.get_parameter("stem.0.weight")
    torch.testing.assert_close(change, torch.full_like(change, 8.0))


@pytest.mark.parametrize(
    ("tensors", "settings", "text"),
    [
        ({}, {"use_dora": True}, "use_dora is True .* merge the adapter with PEFT"),
        ({}, {"bias": "all"}, "bias is 'all'"),
        ({"base_model.model.head.bias": torch.ones(1)}, {}, "'base_model.model.head.bias' .* is no pair"),
        ({"base_model.model.head.lora_B.weight": torch.ones(7, 2)}, {}, r"'head' changes a weight of \[7, 96\]"),
        (
            {f"base_model.model.hat.lora_{side}.weight": torch.ones(2, 2) for side in "AB"},
            {},
            "no linear layer or convolution called 'hat'; it has stem.0",
        ),
    ],
)
def test_what_cannot_be_folded_is_refused(
    base: TinyBase, tensors: Any, settings: Any, text: str, tmp_path: Path
) -> None:
    with pytest.raises(PassFailed, match=text):
        folded(base, tmp_path, lora_tensors() | tensors, **settings)
    with pytest.raises(PassFailed, match="holds no tensor named"):
        folded(base, tmp_path, {})
