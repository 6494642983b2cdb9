"""The order of passes: tags, stages, and the remedy in the message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from pydantic import TypeAdapter

from leanserve.passes import ALL, AnyPass
from leanserve.passes.base import Pass, Stage
from leanserve.passes.composition import find_violation

PASS: TypeAdapter[Pass] = TypeAdapter(AnyPass)
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "prune_channels": {"macs": 0.5},
    "lowrank_linear": {"energy": 0.9},
    "lowrank_conv": {"energy": 0.9},
}


def make(*kinds: str) -> list[Pass]:
    return [PASS.validate_python({"kind": kind} | dict(OPTIONS.get(kind, {}))) for kind in kinds]


@pytest.mark.parametrize(
    "kinds",
    [
        (),
        ("prune_channels", "distill", "fold_bn", "quantize_static", "onnxruntime"),
        ("prune_channels", "distill", "lowrank_conv", "distill", "fold_bn", "channels_last", "torch_compile"),
        ("fold_bn", "cast", "channels_last"),
        ("quantize_static",),
    ],
)
def test_legal_orders(kinds: tuple[str, ...]) -> None:
    assert find_violation(make(*kinds)) is None


@pytest.mark.parametrize(
    ("kinds", "position", "texts"),
    [
        (
            ("quantize_static", "prune_channels"),
            1,
            (
                "'prune_channels' (structural removal) cannot come after 'quantize_static' (precision)",
                "prune_channels -> quantize_static",
            ),
        ),
        (
            ("fold_bn", "distill"),
            1,
            ("'distill' (training) cannot come after 'fold_bn' (numeric preparation)", "distill -> fold_bn"),
        ),
        (("torch_compile", "channels_last"), 1, ("(layout and runtime) cannot come after 'torch_compile' (loading)",)),
        (("onnxruntime", "channels_last"), 1, ("tag 'eager_module'", "'onnxruntime' has removed it")),
        (("onnxruntime", "onnxruntime"), 1, ("forbids a runtime", "No order of these passes is legal")),
        (("quantize_static", "quantize_dynamic"), 1, ("requires float32 weights", "'quantize_static' has removed it")),
        (("cast", "onnxruntime"), 1, ("tag 'exportable'", "'cast' has removed it")),
    ],
)
def test_a_violation_names_both_passes_the_reason_and_a_legal_order(
    kinds: tuple[str, ...], position: int, texts: tuple[str, ...]
) -> None:
    violation = find_violation(make(*kinds))
    assert violation is not None
    assert violation.position == position
    for text in texts:
        assert text in violation.message


def test_every_pass_declares_its_place() -> None:
    for pass_ in ALL:
        assert pass_.stage in Stage, pass_
        assert pass_.__doc__, pass_
        assert pass_.requires, pass_
