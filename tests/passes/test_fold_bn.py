from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from leanserve.contracts import ModelSpec, OnnxModel, TensorSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied
from leanserve.passes.families.runtime import fold_bn
from leanserve.passes.families.runtime.fold_bn import FoldBn
from tiny_base import IMAGES, TinyNet, context_of, lively, tiny_base


def spec_of(*shape: int) -> ModelSpec:
    return ModelSpec((TensorSpec("x", "float32", shape),), (TensorSpec("y", "float32", (1,)),))


def folded(module: nn.Module, spec: ModelSpec, scratch: Path) -> tuple[nn.Module, Applied]:
    applied = FoldBn().apply(TorchModel(module, spec), context_of(tiny_base(), scratch))
    assert isinstance(applied.model, TorchModel)
    return applied.model.module, applied


def norms(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)), (3, 9)),
    "conv2d without bias": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)), (3, 9, 9)),
    "conv2d grouped, padding same": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding="same", groups=2), nn.BatchNorm2d(6)),
        (4, 9, 9),
    ),
    "conv2d padded by reflection": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)),
        (3, 9, 9),
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4)), (2, 5, 5, 5)),
    "conv_transpose1d": (lambda: nn.Sequential(nn.ConvTranspose1d(3, 6, 3), nn.BatchNorm1d(6)), (3, 9)),
    "conv_transpose2d grouped": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(6)),
        (4, 5, 5),
    ),
    "conv_transpose3d": (lambda: nn.Sequential(nn.ConvTranspose3d(2, 4, 2), nn.BatchNorm3d(4)), (2, 4, 4, 4)),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)), (5,)),
    "norm without weights": (lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7, affine=False)), (5,)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_folding_changes_nothing_but_rounding_and_replays(tmp_path: Path, case: str) -> None:
    make, shape = LAYERS[case]
    module, x = lively(make(), seed=3), torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    before, expected = copy.deepcopy(module.state_dict()), module(x)
    result, applied = folded(module, spec_of(*shape), tmp_path)
    assert not norms(result)
    assert applied.decisions == {"pairs": [["0", "1"]]}
    assert (result(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    again = FoldBn().rebuild_structure(make().eval(), applied.decisions)
    again.load_state_dict(result.state_dict(), strict=True)
    assert torch.equal(again(x), result(x))


def test_a_residual_network_is_folded_whole(tmp_path: Path) -> None:
    module = lively(TinyNet(), seed=3)
    x = torch.from_numpy(tiny_base().inputs[0])
    result, applied = folded(module, IMAGES, tmp_path)
    assert applied.decisions == {"pairs": [["stem", "stem_norm"], ["conv", "norm"]]}
    assert applied.facts["folded"] == 2
    assert applied.facts["relative_change"] < 1e-5
    assert torch.allclose(result(x), module(x), atol=1e-5)
    assert not result.training


class Awkward(nn.Module):
    """Batch norms that look foldable by name or order and are not, and one (`c`, `c_norm`) that is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)  # the output of `a` is used twice
        self.b, self.b_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)  # an activation lies between
        self.c, self.c_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.twice, self.norm_1, self.norm_2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.d, self.d_norm = (
            nn.Conv2d(3, 3, 1),
            nn.BatchNorm2d(3, track_running_stats=False),
        )  # statistics of the batch
        self.e, self.shared = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)  # the norm is used twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        x = a + self.a_norm(a)
        x = self.b_norm(torch.relu(self.b(x)))
        x = self.c_norm(self.c(x))
        x = self.norm_1(self.twice(x)) + self.norm_2(self.twice(x))
        x = self.d_norm(self.d(x))
        return self.shared(torch.relu(self.shared(self.e(x))))  # type: ignore[no-any-return]


def test_what_cannot_be_folded_is_left_alone(tmp_path: Path) -> None:
    module = lively(Awkward(), seed=3)
    x = torch.randn(2, 3, 4, 4)
    result, applied = folded(module, spec_of(3, 4, 4), tmp_path)
    assert applied.decisions == {"pairs": [["c", "c_norm"]]}
    assert torch.allclose(result(x), module(x), atol=1e-5)


class Positions(nn.Module):
    """Batch norm over the second axis of (N, L, C): the positions, not the linear layer's features."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.Sequential(nn.Linear(5, 2), nn.ReLU()), (5,)), (Positions(), (5, 5))],
    ids=["none", "axis"],
)
def test_nothing_to_fold_is_an_error(tmp_path: Path, module: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(PassFailed, match="no batch norm follows a convolution or linear layer; drop the pass"):
        folded(lively(module, seed=3), spec_of(*shape), tmp_path)


def test_an_onnx_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match="put it before the pass that exports"):
        FoldBn().apply(OnnxModel(tmp_path / "model.onnx", IMAGES), context_of(tiny_base(), tmp_path))


class Masked(nn.Module):
    """Answers -inf in its first column."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        masked: torch.Tensor = self.layers(x).masked_fill(torch.arange(7) == 0, -torch.inf)
        return masked


def test_a_wrong_fold_shows_beside_infinite_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = lively(Masked(), seed=3)
    _, applied = folded(module, spec_of(5), tmp_path)
    assert applied.facts["relative_change"] < 1e-5
    monkeypatch.setattr(fold_bn, "_folded", lambda layer, _: (layer.weight * 1.01, layer.bias))
    with pytest.raises(PassFailed, match="changed the outputs"):
        folded(module, spec_of(5), tmp_path)
