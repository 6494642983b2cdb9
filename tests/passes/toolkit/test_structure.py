"""Structure written down and repeated: shapes, attributes, layers held twice."""

from __future__ import annotations

import json

import torch
from torch import nn

from leanserve.passes.toolkit.structure import differences, replace, reshape


def net(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, groups=1),
        nn.BatchNorm2d(width),
        nn.BatchNorm2d(width, affine=False, track_running_stats=False),
        nn.Conv2d(width, width, 3, groups=width, bias=False),
        nn.PReLU(width),
        nn.GroupNorm(2, width),
        nn.LayerNorm((width, 4, 4)),
        nn.Flatten(),
        nn.Linear(width * 16, 5),
    ).eval()


def test_any_change_of_width_survives_json() -> None:
    narrow = net(6)
    images = torch.randn(2, 3, 8, 8)
    found = json.loads(json.dumps(differences(net(8), narrow)))
    fresh = reshape(net(8), found)
    fresh.load_state_dict(narrow.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(fresh(images), narrow(images))
    for name, child in narrow.named_modules():
        assert repr(fresh.get_submodule(name)) == repr(child)
    assert differences(net(8), net(8)) == {}
    assert found["2"] == {"shapes": {}, "attributes": {"num_features": 6}}


def test_a_layer_held_twice_is_replaced_twice() -> None:
    layer = nn.Linear(4, 4)
    root = nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer))
    new = nn.Identity()
    replace(root, layer, new)
    assert root[0] is new
    assert root.get_submodule("1.1") is new
