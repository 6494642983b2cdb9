"""Modules that return no plain tensor: their tensors are served in order, by the names they have, everywhere alike."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from leanserve.bases.loaded import LoadedBase
from leanserve.bases.modules.tensor_outputs import named_tensors
from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.contracts import Arrays, Model, Share, TorchModel
from leanserve.errors import ConfigError
from leanserve.passes.families.distill.distill import Distill
from leanserve.passes.families.precision.cast import Cast
from leanserve.passes.families.quantize.quantize_static import QuantizeStatic
from leanserve.passes.families.runtime.onnxruntime import OnnxRuntime
from leanserve.runtime.formats import open_backend
from tiny_base import context_of

SOURCE = """
from collections import namedtuple
from dataclasses import dataclass
import torch
from torch import nn
from tiny_base import context_of

Pair = namedtuple("Pair", "scores boxes")

@dataclass
class Record:
    loss: object
    scores: object
    hidden: object = None

class Net(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return FORMS[self.form](self.second(hidden), hidden)

def model_output(a, b):
    from transformers.modeling_outputs import SequenceClassifierOutput
    return SequenceClassifierOutput(loss=None, logits=a, hidden_states=(b, b + 1))

FORMS = {
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "one in a list": lambda a, b: [a],
    "dict": lambda a, b: {"scores": a, "boxes": b},
    "namedtuple": Pair,
    "dataclass": lambda a, b: Record(a.mean(), a, [b, None]),
    "nested": lambda a, b: [{"out": a, "aux": [b, (b * 2,)]}, None, b * 3, 0.5],
    "same names": lambda a, b: ({"x": a}, {"x": b}),
    "model output": model_output,
    "object": lambda a, b: {"scores": a, "cache": object()},
    "nothing": lambda a, b: None,
    "empty": lambda a, b: [],
    "loss": lambda a, b: {"loss": a.mean()},
    "a list of rows": lambda a, b: [{"scores": row.expand(2, 3)} for row in a],
}

def net(form):
    torch.manual_seed(0)
    return Net(form)

class Single(nn.Module):
    def forward(self, x):
        return {"out": x.view(1, 4) * 2}

def single():
    return Single()
"""
NAMES = {
    "list": ("output", "output_1"),
    "tuple": ("output", "output_1"),
    "one in a list": ("output",),
    "dict": ("scores", "boxes"),
    "namedtuple": ("scores", "boxes"),
    "dataclass": ("scores", "hidden"),
    "nested": ("out", "aux", "aux_1", "output_3"),
    "same names": ("x_1", "x_2"),
    "model output": ("logits", "hidden_states", "hidden_states_1"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "bring_outputs.py").write_text(SOURCE)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield tmp_path
    sys.modules.pop("bring_outputs", None)


def opened(folder: Path, form: str, **keys: Any) -> LoadedBase:
    declared = {"python": "bring_outputs:net", "arguments": {"form": form}, "inputs": {"x": {"shape": [4]}}} | keys
    return open_base(Origin.model_validate({"base": declared, "data": {"synthetic": 64}, "folder": folder}))


def answers(model: Model, rows: Arrays) -> Arrays:
    backend = open_backend(model, Share(1))
    try:
        return backend.run(rows).outputs
    finally:
        backend.close()


def expected(folder: Path, form: str, rows: Arrays) -> Arrays:
    """The tensors of the user's own module, picked by hand."""
    module: nn.Module = sys.modules["bring_outputs"].net(form)
    with torch.inference_mode():
        hidden = torch.relu(module.first(torch.from_numpy(rows[0])))  # type: ignore[operator]
        scores = module.second(hidden)  # type: ignore[operator]
    tensors = {
        "one in a list": (scores,),
        "nested": (scores, hidden, hidden * 2, hidden * 3),
        "model output": (scores, hidden, hidden + 1),
    }.get(form, (scores, hidden))
    return tuple(tensor.numpy() for tensor in tensors)


@pytest.mark.parametrize("form", NAMES)
def test_tensors_are_served_in_order_by_their_names(folder: Path, form: str) -> None:
    base = opened(folder, form)
    assert tuple(item.name for item in base.spec.outputs) == NAMES[form]
    rows = base.spec.example(5)
    wanted = expected(folder, form, rows)
    found = answers(base.model(), rows)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert "first.weight" in base.torch_module().state_dict(), "layers keep their names"


def test_passes_and_exports_answer_the_same(folder: Path) -> None:
    form = "nested"
    base = opened(folder, form)
    rows = base.spec.example(5)
    wanted = expected(folder, form, rows)
    context = context_of(base, folder)
    exported = OnnxRuntime().apply(base.model(), context).model
    narrow, int8 = Cast().apply(base.model(), context).model, QuantizeStatic().apply(exported, context).model
    for model, limit in ((exported, 1e-5), (narrow, 0.05), (int8, 0.1)):
        found = answers(model, rows)
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=limit)


def test_a_student_learns_from_all_tensors(folder: Path) -> None:
    base = opened(folder, "nested")
    model = base.model()
    assert isinstance(model, TorchModel)
    with torch.no_grad():
        model.module.get_parameter("second.bias").add_(1)
    context = context_of(base, folder)
    facts = Distill(epochs=40, loss="mse").apply(model, context).facts
    assert facts["last_loss"] < 0.8 * facts["first_loss"]


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (
            "object",
            r"an object of type object as 'cache'; .* in a tuple, list, dict or dataclass\. .*return self\.model\(x\)",
        ),
        ("nothing", "returns nothing; it must return tensors"),
        ("empty", "returns a list without tensors"),
        ("a list of rows", r"its output 'scores' has shape \[2, 3\] for 3 rows: the first axis must count the rows"),
        ("loss", r"its output 'loss' has shape \[\] for 3 rows: the first axis must count the rows"),
    ],
)
def test_what_cannot_be_served_is_told_with_the_remedy(folder: Path, form: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        opened(folder, form)


def test_classes_are_those_of_the_first_tensor(folder: Path) -> None:
    base = opened(folder, "dict", labels=["a", "b", "c"])
    assert [item.name for item in base.spec.outputs] == ["scores", "boxes"]
    assert base.spec.labels == ("a", "b", "c")


def test_a_model_of_single_rows_may_return_containers(folder: Path) -> None:
    declared = {"python": "bring_outputs:single", "inputs": {"x": {"shape": [4]}}, "rows": "one"}
    base = open_base(Origin.model_validate({"base": declared, "data": {"synthetic": 8}, "folder": folder}))
    row = base.spec.example(1)
    np.testing.assert_array_equal(answers(base.model(), row)[0], row[0] * 2)


def test_outputs_are_not_called_like_inputs(folder: Path) -> None:
    assert [item.name for item in opened(folder, "dict", inputs={"boxes": {"shape": [4]}}).spec.outputs] == [
        "scores",
        "boxes_1",
    ]


def test_other_containers_are_told_by_their_type() -> None:
    with pytest.raises(TypeError, match="of type set"):
        named_tensors({torch.ones(1)})
    assert [name for name, _ in named_tensors({"a": [torch.ones(1), {"b": torch.ones(1)}]})] == ["a", "a_b"]
