"""The shipped config of ResNet-50: what it asks for can be had, whatever the weights are."""

from __future__ import annotations

from pathlib import Path

from leanserve.bases.sources.timm_model import imported_timm
from leanserve.config.schema import read_config
from leanserve.contracts import ModelSpec, TensorSpec, TorchModel
from leanserve.passes.families.lowrank.lowrank_conv import LowrankConv
from leanserve.passes.toolkit.ranks import DEFAULT_MULTIPLE
from leanserve.runtime.formats.torch_size import count_macs

CONFIG = Path(__file__).parent.parent.parent / "models" / "resnet50.yaml"
SPEC = ModelSpec((TensorSpec("image", "float32", (3, 224, 224)),), (TensorSpec("logits", "float32", (1000,)),))


def test_its_share_of_macs_is_within_reach_of_low_ranks() -> None:
    [pass_] = [step for item in read_config(CONFIG).variants for step in item.passes if isinstance(step, LowrankConv)]
    model = TorchModel(imported_timm().create_model("resnet50").eval(), SPEC)
    splits, _ = pass_._splits(model)
    saved = sum(max(0, split.dense - split.cost((DEFAULT_MULTIPLE,) * split.ranks)) for split in splits.values())
    assert pass_.macs is not None
    assert 1 - saved / count_macs(model) < pass_.macs
