from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from leanserve.contracts import ModelSpec, OnnxModel, TensorSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.hardware import Gpu, Hardware
from leanserve.passes.families.precision.cast import Cast
from tiny_base import IMAGES, TinyBase, TinyNet, context_of, lively, tiny_base

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def cast(scratch: Path, **options: object) -> tuple[nn.Module, nn.Module, dict[str, object]]:
    """The module before and after, and the decisions."""
    model = TorchModel(lively(TinyNet(), seed=3), IMAGES)
    applied = Cast.model_validate(options).apply(model, context_of(tiny_base(), scratch))
    assert isinstance(applied.model, TorchModel)
    return model.module, applied.model.module, dict(applied.decisions)


def dtypes_inside(module: nn.Module) -> dict[str, torch.dtype]:
    """The dtype that each named layer computes in: that of its output before any conversion."""
    seen: dict[str, torch.dtype] = {}
    for name, child in module.named_modules():
        if name:
            child.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.__setitem__(name, inputs[0].dtype), prepend=False
            )
    module(torch.from_numpy(tiny_base().inputs[0]))
    return seen


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_and_activations_are_narrow_and_answers_stay_near(tmp_path: Path, dtype: str) -> None:
    before, after, _ = cast(tmp_path, dtype=dtype)
    images = torch.from_numpy(tiny_base().inputs[0])
    assert {weight.dtype for weight in before.parameters()} == {torch.float32}
    assert {weight.dtype for weight in after.parameters()} == {DTYPES[dtype]}
    assert set(dtypes_inside(copy.deepcopy(after)).values()) == {DTYPES[dtype]}
    expected, given = before(images), after(images)
    assert given.dtype == torch.float32
    assert 0 < (given - expected).abs().max() < 0.05 * expected.abs().max()


def test_kept_layers_compute_in_float32(tmp_path: Path) -> None:
    _, after, decisions = cast(tmp_path, keep=["conv", "type:BatchNorm2d"])
    assert decisions == {"keep": ["stem_norm", "conv", "norm"]}
    wide = {name.rpartition(".")[0] for name, weight in after.named_parameters() if weight.dtype == torch.float32}
    assert wide == {"stem_norm", "conv", "norm"}
    inside = dtypes_inside(after)
    assert {name for name, dtype in inside.items() if dtype == torch.float32} == wide
    assert inside["head"] == torch.bfloat16


def test_a_kept_container_keeps_all_it_holds(tmp_path: Path) -> None:
    module = lively(nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8)), nn.Linear(8, 2)), 3)
    applied = Cast(keep=("1",)).apply(TorchModel(module, IMAGES), context_of(tiny_base(), tmp_path))
    assert isinstance(applied.model, TorchModel)
    assert applied.decisions == {"keep": ["1"]}
    assert {name for name, weight in applied.model.module.named_parameters() if weight.dtype == torch.float32} == {
        "1.0.weight", "1.0.bias", "1.1.weight", "1.1.bias"
    }  # fmt: skip
    assert applied.model.module(torch.from_numpy(tiny_base().inputs[0])).dtype == torch.float32


class Containers(nn.Module):
    """Takes a list and returns tensors within containers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 2)

    def forward(self, images: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        return {"out": [self.layer(images[0])]}


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Containers()
        self.head = nn.Linear(2, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.inner([image.flatten(1)])["out"][0])
        return logits


def test_a_kept_layer_may_take_and_return_containers(tmp_path: Path) -> None:
    before = lively(Around(), 3)
    applied = Cast(keep=("inner",)).apply(TorchModel(before, IMAGES), context_of(tiny_base(), tmp_path))
    assert isinstance(applied.model, TorchModel)
    images = torch.from_numpy(tiny_base().inputs[0])
    torch.testing.assert_close(applied.model.module(images), before(images), rtol=0.05, atol=0.05)


def test_the_decisions_replay_the_structure(tmp_path: Path) -> None:
    _, after, decisions = cast(tmp_path, keep=["norm"])
    again = Cast(keep=("norm",)).rebuild_structure(lively(TinyNet(), seed=9), decisions)
    assert {name: value.dtype for name, value in again.state_dict().items()} == {
        name: value.dtype for name, value in after.state_dict().items()
    }
    again.load_state_dict(after.state_dict(), strict=True)
    images = torch.from_numpy(tiny_base().inputs[0])
    assert torch.equal(again(images), after(images))
    assert torch.equal(copy.deepcopy(again)(images), after(images))


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(2, 8), nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = (self.table(ids) * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        return self.head(mean), ids.sum(1)


def test_integers_pass_untouched_and_float_outputs_come_back_as_float32(tmp_path: Path) -> None:
    spec = ModelSpec(
        (TensorSpec("ids", "int64", (None,)), TensorSpec("mask", "int64", (None,))),
        (TensorSpec("embedding", "float32", (3,)), TensorSpec("total", "int64", ())),
    )
    applied = Cast().apply(TorchModel(Embedding().eval(), spec), context_of(tiny_base(), tmp_path))
    assert isinstance(applied.model, TorchModel)
    embedding, total = applied.model.module(*(torch.from_numpy(array) for array in spec.example(3)))
    assert embedding.dtype == torch.float32
    assert total.dtype == torch.int64


def test_the_speed_is_measured_against_the_given_model(tmp_path: Path) -> None:
    applied = Cast().apply(TorchModel(lively(TinyNet(), seed=3), IMAGES), context_of(tiny_base(), tmp_path))
    assert applied.facts["speedup"] > 0
    assert applied.facts["kept_layers"] == 0


@pytest.mark.parametrize(
    ("dtype", "flags"),
    [
        ("bf16", {"avx512_bf16"}),
        ("bf16", {"amx_bf16"}),
        ("bf16", {"bf16"}),
        ("fp16", {"avx512_fp16"}),
        ("fp16", {"asimdhp"}),
    ],
)
def test_emulation_is_refused(dtype: str, flags: set[str]) -> None:
    pass_ = Cast.model_validate({"dtype": dtype})
    assert pass_.unsupported_reason(Hardware("x", 1, tuple(flags))) is None
    reason = pass_.unsupported_reason(Hardware("x", 1, ("asimd", "avx2", "avx512_vnni", "avx512f")))
    assert reason is not None
    assert f"cast to {dtype} would be emulated" in reason
    assert next(iter(flags)) in reason


def test_a_gpu_computes_in_all_of_them_and_tf32_asks_for_one() -> None:
    gpu = Hardware("x", 1, (), (Gpu("H200", 1),), ("cuda:0",))
    for dtype in ("bf16", "fp16", "tf32"):
        assert Cast.model_validate({"dtype": dtype}).unsupported_reason(gpu) is None
    assert "there is no GPU; take bf16" in str(Cast(dtype="tf32").unsupported_reason(Hardware("x", 1, ("amx_bf16",))))
    with pytest.raises(ValidationError, match="tf32 changes no tensor"):
        Cast(dtype="tf32", how="autocast")


class Traced(nn.Module):
    """Notes in what its products and its norms compute."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(64, 16), nn.LayerNorm(16), nn.Linear(16, 2)
        self.seen: dict[str, torch.dtype] = {}

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        first = self.first(image.flatten(1))
        norm = self.norm(first)
        second: torch.Tensor = self.second(norm)
        self.seen = {"first": first.dtype, "norm": norm.dtype, "second": second.dtype}
        return second


@pytest.mark.parametrize(
    ("keep", "first", "second"), [((), "bf16", "bf16"), (("second",), "bf16", None), (("first",), None, "bf16")]
)
def test_autocast_chooses_by_operation_and_weights_stay_float32(
    tmp_path: Path, keep: tuple[str, ...], first: str | None, second: str | None
) -> None:
    given = TorchModel(lively(Traced(), seed=3), IMAGES)
    applied = Cast(how="autocast", keep=keep).apply(given, context_of(tiny_base(), tmp_path))
    assert isinstance(applied.model, TorchModel)
    module, images = applied.model.module, torch.from_numpy(tiny_base().inputs[0])
    assert {weight.dtype for weight in module.parameters()} == {torch.float32}
    answers, right = module(images), given.module(images)
    assert answers.dtype == torch.float32
    assert 0 < (answers - right).abs().max() < 0.05 * right.abs().max()
    seen = getattr(module, "seen")  # noqa: B009 - of a module, torch's types know tensors and modules only
    wanted = {"first": first, "second": second}
    assert {name: seen[name] for name in wanted} == {
        name: torch.float32 if dtype is None else DTYPES[dtype] for name, dtype in wanted.items()
    }
    assert not torch.is_autocast_enabled("cpu")


def test_tf32_is_set_around_the_module_and_not_around_what_it_keeps() -> None:
    seen: dict[str, str] = {}
    module = Traced()
    for name in ("first", "second"):
        inner = module.get_submodule(name)
        inner.forward = Noting(inner.forward, seen, name)
    before = torch.backends.cuda.matmul.fp32_precision
    made = Cast(dtype="tf32", keep=("second",)).rebuild_structure(module, {"keep": ["second"]})
    made(torch.zeros(1, 64))
    assert seen == {"first": "tf32", "second": "ieee"}
    assert torch.backends.cuda.matmul.fp32_precision == before


class Noting:
    """A `forward` that notes the setting under which it runs."""

    def __init__(self, forward: Any, seen: dict[str, str], name: str) -> None:
        self.forward, self.seen, self.name = forward, seen, name

    def __call__(self, *args: Any) -> Any:
        self.seen[self.name] = torch.backends.cuda.matmul.fp32_precision
        return self.forward(*args)


def test_overflow_and_unknown_layers_are_errors(tmp_path: Path) -> None:
    with torch.no_grad():
        module = lively(TinyNet(), seed=3)
        module.get_parameter("head.bias").fill_(1e5)
    base: TinyBase = tiny_base()
    with pytest.raises(PassFailed, match=r"cast.dtype fp16 overflows in this model; use bf16"):
        Cast(dtype="fp16").apply(TorchModel(module, IMAGES), context_of(base, tmp_path))
    with pytest.raises(PassFailed, match=r"stem_nrm.*stem_norm"):
        Cast(keep=("stem_nrm",)).apply(TorchModel(module, IMAGES), context_of(base, tmp_path))
    with pytest.raises(PassFailed, match="put it before the pass that exports"):
        Cast().apply(OnnxModel(tmp_path / "model.onnx", IMAGES), context_of(base, tmp_path))
    with pytest.raises(ValidationError, match="dtype"):
        Cast.model_validate({"dtype": "float8"})


class Ruled(nn.Module):
    """Rules out its last class: a logit of -inf."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = lively(TinyNet(), seed=3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(self.inner(image), (0, 1), value=-torch.inf)


def test_what_is_infinite_in_float32_too_is_no_overflow(tmp_path: Path) -> None:
    model = TorchModel(Ruled().eval(), IMAGES)
    applied = Cast(dtype="bf16").apply(model, context_of(tiny_base(), tmp_path))
    assert isinstance(applied.model, TorchModel)
    assert applied.model.module(torch.from_numpy(tiny_base().inputs[0])).isneginf().any(1).all()
