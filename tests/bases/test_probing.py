"""What rows do to each other, found out by running a few: what is refused, in which words, and what is served how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor as Values
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from leanserve.bases.description import Tensor
from leanserve.bases.inputs import MASKED_TEXT
from leanserve.bases.probing import check_rows, probe, spec_of_inputs
from leanserve.bases.tracing import runner, sized
from leanserve.bases.tracing import traced as traced_module
from leanserve.contracts import Array, Arrays, RowsTogether
from leanserve.errors import ConfigError

ROW = (Tensor(name="x", dtype="float32", shape=(6,)),)
SEQUENCE = (Tensor(name="x", dtype="float32", shape=(None, 6)),)
IMAGE = (Tensor(name="x", dtype="float32", shape=(3, 8, 8)),)
WIDTH = 24  # as long as the longer of the rows that are tried: an axis of that size is nothing to cut


class Function(nn.Module):
    """A layer, and what is done with its outputs."""

    def __init__(self, after: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.after = nn.Linear(6, WIDTH), after

    def forward(self, x: Values) -> Any:
        return self.after(self.layer(x))


class TrainingNorm(nn.Module):
    """A batch norm that a forward method puts into training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Values) -> Values:
        self.train()
        return self.norm(self.conv(x)).mean((2, 3))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """The last states of a bidirectional LSTM, which reads padding as if it were a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, batch_first=True, bidirectional=True)

    def forward(self, x: Values) -> Values:
        _, (state, _) = self.lstm(x)
        return torch.cat([state[0], state[1]], dim=-1)


class AlongTheBatch(nn.Module):
    """An LSTM that takes the first axis for time, as torch does unless it is told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5)

    def forward(self, x: Values) -> Values:
        return self.lstm(x)[0]  # type: ignore[no-any-return]


class Reader(nn.Module):
    """A bidirectional LSTM over token ids that stops where the mask does."""

    def __init__(self, *, masked: bool) -> None:
        super().__init__()
        self.words, self.lstm, self.masked = (
            nn.Embedding(50, 6),
            nn.LSTM(6, 5, batch_first=True, bidirectional=True),
            masked,
        )

    def forward(self, ids: Values, mask: Values) -> Values:
        lengths = mask.sum(1) if self.masked else torch.full((len(ids),), ids.shape[1])
        packed = pack_padded_sequence(self.words(ids), lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return states


class Counting(nn.Module):
    """Remembers what it was asked."""

    calls: ClassVar[list[int]] = []

    def forward(self, x: Values) -> Values:
        self.calls.append(len(x))
        return x * len(self.calls)


def only_one(x: Values) -> Values:
    if len(x) > 1:
        raise ValueError("one at a time, please")
    return x


def scaled_by_batch(x: Values) -> Values:
    scale = x.abs().amax() / 127
    return torch.round(x / scale) * scale


def after_the_end(y: Values) -> Values:
    """What stands behind each token; -1 behind the last."""
    return F.pad(y, (0, 0, 0, 1), value=-1)[:, 1:]


MIXING: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "a mean over the batch": (Function(lambda y: y - y.mean(0)), ROW),
    "a softmax over axis 0": (Function(lambda y: y.softmax(0)), ROW),
    "one scale for the batch": (Function(scaled_by_batch), ROW),
    "sums along the batch": (Function(lambda y: y.cumsum(0)), ROW),
    "sums along the batch, backwards": (Function(lambda y: y.flip(0).cumsum(0).flip(0)), ROW),
    "statistics of the batch": (TrainingNorm(), IMAGE),
    "a recurrence along the batch": (AlongTheBatch(), SEQUENCE),
    "a row for all": (Function(lambda y: y.mean(0, keepdim=True).expand_as(y)), ROW),
    "a second output": (Function(lambda y: (y, y.softmax(0))), ROW),
}
LEAKING: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "the last state of an LSTM": (Recurrent(), SEQUENCE),
    "a mean over the sequence": (Function(lambda y: y.mean(1)), SEQUENCE),
    "a mask that is not read": (Reader(masked=False), MASKED_TEXT),
    "a length that is not the row's": (Function(lambda y: y[:, ::2]), SEQUENCE),
    "a softmax over the sequence": (Function(lambda y: y.softmax(1)), SEQUENCE),
    "an end that few rows show": (
        Function(lambda y: (y - 1.6 + after_the_end(y)).relu()),
        SEQUENCE,
    ),
}
APART: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "a layer": (Function(torch.relu), ROW),
    "a layer per token": (Function(torch.relu), SEQUENCE),
    "two outputs, of a row and of its tokens": (Function(lambda y: (y.amax(1).relu(), y)), SEQUENCE),
    "an LSTM that stops at the mask": (Reader(masked=True), MASKED_TEXT),
    "infinity": (Function(lambda y: y.masked_fill(y < 0, -torch.inf)), ROW),
    "NaN": (Function(lambda y: y.masked_fill(y < 0, torch.nan)), ROW),
    "in place": (Function(lambda y: y.relu_()), ROW),
    "what refuses a huge number": (Function(lambda y: y if y.abs().max() < 100 else torch.linalg.cholesky(y)), ROW),
}


def traced(module: nn.Module, inputs: tuple[Tensor, ...], rows: RowsTogether = "any") -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return traced_module(module.eval(), spec_of_inputs(inputs, rows)).outputs


@pytest.mark.parametrize(("module", "inputs"), APART.values(), ids=APART.keys())
def test_what_keeps_rows_apart_is_served(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert all(output.dtype == "float32" for output in traced(module, inputs))


@pytest.mark.parametrize(("module", "inputs"), MIXING.values(), ids=MIXING.keys())
def test_what_mixes_rows_is_refused_unless_they_run_one_by_one(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    for rows in ("any", "one_length"):
        with pytest.raises(
            ConfigError, match=r"depends on the other rows of its batch .*strangers.*base\.rows: one, and"
        ):
            traced(module, inputs, rows)
    if module is not MIXING["statistics of the batch"][0]:
        assert traced(module, inputs, "one")


def test_a_norm_in_training_mode_changes_from_call_to_call(monkeypatch: pytest.MonkeyPatch) -> None:
    module = TrainingNorm()
    monkeypatch.setattr(module.norm, "momentum", 0.0)
    assert traced(module, IMAGE, "one"), "a row by itself is normalised by itself"


@pytest.mark.parametrize(("module", "inputs"), LEAKING.values(), ids=LEAKING.keys())
def test_what_sees_padding_is_refused_unless_lengths_are_equal(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with pytest.raises(ConfigError, match=r"depends on how far it is padded .*strangers.*say base\.rows: one_length"):
        traced(module, inputs)
    for rows in ("one_length", "one"):
        assert traced(module, inputs, rows)


@pytest.mark.parametrize(
    "module",
    [
        Function(F.dropout),
        Function(lambda y: y + torch.randn_like(y)),
        Function(lambda y: y.masked_fill(torch.rand_like(y) < 0.5, -torch.inf)),
        Counting(),
    ],
    ids=["dropout left on", "noise", "infinity by chance", "memory"],
)
@pytest.mark.parametrize("rows", ["any", "one_length", "one"])
def test_what_answers_the_same_row_differently_is_refused(module: nn.Module, rows: RowsTogether) -> None:
    with pytest.raises(ConfigError, match=r"another answer the second time .*dropout left on"):
        traced(module, ROW, rows)


def test_what_takes_one_row_only_is_served_row_by_row() -> None:
    module = Function(only_one)
    with pytest.raises(
        ConfigError, match=r"one at a time, please.*does run on a single row\. Mend that, or say base\.rows"
    ):
        traced(module, ROW)
    assert traced(module, ROW, "one")[0].shape == (WIDTH,)


def test_row_by_row_no_second_row_is_ever_run() -> None:
    Counting.calls.clear()
    with pytest.raises(ConfigError, match="the second time"):
        traced(Counting(), ROW, "one")
    assert set(Counting.calls) == {1}


def test_a_model_of_which_one_row_is_too_many_says_why() -> None:
    with pytest.raises(ConfigError, match=r"does not run on x \[3, 6\]: RuntimeError") as refused:
        traced(nn.Linear(5, 2), ROW)
    assert "base.rows" not in str(refused.value)


def test_files_are_tried_in_the_same_way() -> None:
    mixing, leaking = runner(MIXING["a mean over the batch"][0]), runner(LEAKING["a mean over the sequence"][0])
    row, sequence = spec_of_inputs(ROW, "any"), spec_of_inputs(SEQUENCE, "any")
    with pytest.raises(ConfigError, match=r"base\.rows: one, and"):
        probe(mixing, row, ["y"])
    with pytest.raises(ConfigError, match=r"base\.rows: one_length"):
        probe(leaking, sequence, ["y"])
    with pytest.raises(ConfigError, match=r"does run on a single row"):
        probe(runner(Function(only_one)), row, ["y"])
    assert probe(mixing, spec_of_inputs(ROW, "one"), ["y"]).outputs[0].shape == (WIDTH,)
    alike = spec_of_inputs(SEQUENCE, "one_length")
    assert probe(runner(Function(torch.relu)), alike, ["y"]).outputs[0].shape == (None, WIDTH)


def test_differences_of_rounding_are_none() -> None:
    def rounding(batch: tuple[np.ndarray[Any, Any], ...]) -> list[np.ndarray[Any, Any]]:
        return [batch[0] * np.float32(1 + 1e-5 * len(batch[0]))]

    assert check_rows(rounding, spec_of_inputs(ROW, "any"), ["y"]) == ()


def test_what_only_rounds_otherwise_in_a_larger_batch_is_served_with_a_caveat() -> None:
    def rounding(batch: Arrays) -> list[Array]:
        return [batch[0] * np.float32(1 + 2e-3 * len(batch[0]))]

    row = spec_of_inputs(ROW, "any")
    [caveat] = check_rows(rounding, row, ["y"])
    assert "rounded otherwise" in caveat
    assert "'y' differs by" in caveat
    with pytest.raises(ConfigError, match="depends on the other rows"):
        check_rows(lambda batch: [batch[0] + np.float32(1e-6) * batch[0].mean(0)], row, ["y"])


class Windowed(nn.Module):
    """Cuts sequences into windows of a length, as models of audio do."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.layer, self.length = nn.Linear(6, 4), length

    def forward(self, x: Values) -> Values:
        return self.layer(x).reshape(len(x), -1, self.length, 4)  # type: ignore[no-any-return]


def test_torch_modules_get_sizes_on_which_they_run() -> None:
    spec = spec_of_inputs(SEQUENCE, "one_length")
    halving, caveats = sized(Windowed(32), spec)
    assert (halving.step, caveats) == (32, ())
    assert traced_module(Windowed(32), halving).outputs[0].shape == (None, 32, 4)
    fixed, [caveat] = sized(Windowed(7).requires_grad_(requires_grad=False), spec)
    assert fixed.inputs[0].shape == (112, 6)
    assert "takes x as [112, 6], the first sizes on which it ran" in caveat
    assert sized(nn.Linear(5, 2), spec).spec == spec, "what runs on no size is told why by a run"
