from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from leanserve.contracts import Arrays, ModelSpec, OnnxModel, TensorSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.toolkit import lowering
from leanserve.passes.toolkit.lowering import export_onnx, feeds, open_session
from tiny_base import IMAGES, TinyNet, lively
from tiny_encoder import TOKENS, TinyEncoder

SMALL = ModelSpec((TensorSpec("values", "float32", (4,)),), (TensorSpec("sums", "float32", (4,)),))


@pytest.fixture(scope="module")
def net() -> TorchModel:
    return TorchModel(lively(TinyNet(), seed=1), IMAGES)


@pytest.fixture(scope="module")
def encoder() -> TorchModel:
    return TorchModel(lively(TinyEncoder(), seed=1), TOKENS)


@pytest.fixture(scope="module")
def exported_encoder(encoder: TorchModel, tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return export_onnx(encoder, tmp_path_factory.mktemp("encoder") / "model.onnx")


@pytest.fixture(scope="module")
def exported(net: TorchModel, tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return export_onnx(net, tmp_path_factory.mktemp("net") / "model.onnx")


def answers(model: OnnxModel, batch: Arrays) -> list[np.ndarray]:
    return [np.asarray(output) for output in open_session(model.path).run(None, feeds(model.spec, batch))]


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_any_number_of_rows_is_answered_as_by_the_module(net: TorchModel, exported: OnnxModel, rows: int) -> None:
    batch = IMAGES.example(rows, seed=rows)
    with torch.inference_mode():
        expected = net.module(torch.from_numpy(batch[0])).numpy()
    (got,) = answers(exported, batch)
    assert np.allclose(got, expected, atol=1e-4 * np.abs(expected).max())


class OnlyOne(nn.Module):
    """Takes a single row."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        assert len(values) == 1
        return values.cumsum(1) * values.sum()


def test_a_model_of_which_rows_share_no_batch_is_exported_for_one_row(tmp_path: Path) -> None:
    spec = replace(SMALL, rows="one")
    exported = export_onnx(TorchModel(OnlyOne().eval(), spec), tmp_path / "model.onnx")
    (sums,) = answers(exported, (np.array([[1, 2, 3, 4]], np.float32),))
    assert sums.tolist() == [[10, 30, 60, 100]]
    with pytest.raises(PassFailed):
        export_onnx(TorchModel(OnlyOne().eval(), SMALL), tmp_path / "model.onnx")


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (5, 23)])
def test_any_length_of_tokens_is_answered(
    encoder: TorchModel, exported_encoder: OnnxModel, rows: int, length: int
) -> None:
    ids, mask = TOKENS.example(rows, length, seed=3)
    mask[:, 0] = 1
    with torch.inference_mode():
        expected = encoder.module(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    (got,) = answers(exported_encoder, (ids, mask))
    assert np.allclose(got, expected, atol=1e-4 * np.abs(expected).max())


def test_names_are_those_of_the_spec_and_of_the_layers(exported: OnnxModel) -> None:
    graph = onnx.load(exported.path).graph
    assert [item.name for item in graph.input] == ["image"]
    assert [item.name for item in graph.output] == ["logits"]
    names = [node.name for node in graph.node]
    assert {"stem/Conv", "conv/Conv", "head/Gemm"} <= set(names)
    assert len(set(names)) == len(names)


def test_the_file_says_nothing_about_the_machine_that_made_it(exported: OnnxModel) -> None:
    content = exported.path.read_bytes()
    assert b".py" not in content
    assert str(Path.cwd()).encode() not in content


def test_the_same_model_gives_the_same_bytes_and_stays_as_it_was(
    net: TorchModel, exported: OnnxModel, tmp_path: Path
) -> None:
    before = copy.deepcopy(net.module.state_dict())
    again = export_onnx(net, tmp_path / "model.onnx")
    assert again.path.read_bytes() == exported.path.read_bytes()
    assert not net.module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.module.state_dict().items())


SERIES = ModelSpec((TensorSpec("series", "float32", (None, 3)),), (TensorSpec("logits", "float32", (4,)),))


class Recurrent(nn.Module):
    """Recurrent layers one after the other, eight wide: the mean over the steps and the states at the last one."""

    def __init__(self, *layers: nn.RNNBase) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(8, 4)

    def forward(self, series: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            series, states = layer(series)
        hidden = states[0] if isinstance(states, tuple) else states
        mean = series.sum(1) / series.shape[1]
        logits: torch.Tensor = self.head(mean + hidden.transpose(0, 1).flatten(1))
        return logits


def test_every_export_of_recurrent_layers_answers_at_any_length(tmp_path: Path) -> None:
    """One process exports all variants of a model."""
    for number in range(2):
        layers = nn.LSTM(3, 8, batch_first=True), nn.GRU(8, 4, batch_first=True, bidirectional=True)
        model = TorchModel(lively(Recurrent(*layers), seed=number), SERIES)
        exported = export_onnx(model, tmp_path / f"{number}.onnx")
        operators = [node.op_type for node in onnx.load(exported.path).graph.node]
        assert (operators.count("LSTM"), operators.count("GRU")) == (1, 1), "each layer stays one operator"
        for rows, length in ((1, 1), (2, 7), (3, 40)):
            series = SERIES.example(rows, length)
            with torch.inference_mode():
                expected = model.module(torch.from_numpy(series[0]))
            np.testing.assert_allclose(answers(exported, series)[0], expected, atol=1e-5)


def test_a_layer_that_is_exported_for_a_fixed_length_only_is_named(tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match=r"cannot be exported.* nn\.LSTM and nn\.GRU for any length"):
        export_onnx(TorchModel(Recurrent(nn.RNN(3, 8, batch_first=True)).eval(), SERIES), tmp_path / "model.onnx")


def test_a_file_that_does_not_run_is_refused(net: TorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def run(self, *_: object) -> None:
            raise RuntimeError("cannot be reshaped")

    monkeypatch.setattr(lowering, "open_session", lambda _: Session())
    with pytest.raises(PassFailed, match="does not run on 1 rows of length 16: cannot be reshaped"):
        export_onnx(net, tmp_path / "model.onnx")


class Branching(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values + 1 if values.sum() > 0 else values - 1


class TwoRowsOnly(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(2, 4) + torch.arange(8.0).view(2, 4)


class Noisy(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(values, 0.5, training=True)


class Masked(nn.Module):
    """Answers -inf in its first column."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        masked: torch.Tensor = self.inner(values).masked_fill(torch.tensor([True, False, False, False]), -torch.inf)
        return masked


def test_masked_logits_are_exported(tmp_path: Path) -> None:
    exported = export_onnx(TorchModel(Masked(nn.Linear(4, 4)).eval(), SMALL), tmp_path / "model.onnx")
    (got,) = answers(exported, SMALL.example(3))
    assert np.isneginf(got[:, 0]).all()
    assert np.isfinite(got[:, 1:]).all()


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Branching(), "cannot be exported"),
        (TwoRowsOnly(), "cannot be exported"),
        (Noisy(), "differs"),
        (Masked(Noisy()), "differs"),
    ],
)
def test_what_cannot_be_exported_faithfully_is_refused(module: nn.Module, reason: str, tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match=reason):
        export_onnx(TorchModel(module.eval(), SMALL), tmp_path / "model.onnx")


def test_a_model_too_large_for_one_file_is_refused_before_any_work(
    net: TorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "LARGEST_BYTES", 100)
    with pytest.raises(PassFailed, match="single ONNX file"):
        export_onnx(net, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_exporting_is_silent_even_where_logs_are_shown(
    net: TorchModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    export_onnx(net, tmp_path / "model.onnx")
    assert not [record.name for record in caplog.records if record.name.startswith(("onnx", "torch.onnx"))]


class Tied(nn.Module):
    """A layer that is called twice, a weight that two layers share, two outputs in a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mixed = self.mix(self.mix(self.words(ids)).relu())
        return self.head(mixed), mixed


BUILDING = {
    "a 1-d convolution, grouped": (nn.Sequential(nn.Conv1d(4, 8, 3, groups=2), nn.ReLU()), (4, 12)),
    "a 1-d transposed one": (nn.ConvTranspose1d(4, 6, 3, stride=2), (4, 12)),
    "a 2-d transposed one, grouped": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 6)),
    "a 3-d convolution": (nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4)), (2, 5, 6, 7)),
    "a 3-d transposed one": (nn.ConvTranspose3d(2, 4, 2), (2, 3, 4, 5)),
}


@pytest.mark.parametrize("case", BUILDING)
def test_convolutions_of_every_kind_are_exported_for_any_number_of_rows(case: str, tmp_path: Path) -> None:
    module, shape = BUILDING[case]
    module = module.eval()
    with torch.no_grad():
        given = module(torch.zeros(1, *shape)).shape[1:]
    spec = ModelSpec((TensorSpec("x", "float32", shape),), (TensorSpec("y", "float32", tuple(given)),))
    session = open_session(export_onnx(TorchModel(module, spec), tmp_path / "m.onnx").path)
    for rows in (1, 5):
        batch = spec.example(rows, seed=rows)
        with torch.no_grad():
            wanted = module(torch.from_numpy(batch[0])).numpy()
        given = np.asarray(session.run(None, feeds(spec, batch))[0])
        np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-5)


def test_tied_and_shared_modules_are_exported_with_their_weights_once(tmp_path: Path) -> None:
    outputs = (TensorSpec("scores", "float32", (None, 20)), TensorSpec("mixed", "float32", (None, 8)))
    spec = ModelSpec((TensorSpec("ids", "int64", (None,)),), outputs)
    module = Tied().eval()
    path = export_onnx(TorchModel(module, spec), tmp_path / "m.onnx").path
    ids = np.arange(14).reshape(2, 7)
    with torch.no_grad():
        wanted = [item.numpy() for item in module(torch.from_numpy(ids))]
    for one, other in zip(open_session(path).run(None, {"ids": ids}), wanted, strict=True):
        np.testing.assert_allclose(np.asarray(one), other, rtol=1e-4, atol=1e-5)
    assert path.stat().st_size < 4 * (20 * 8 + 8 * 8 + 8) + 8000, "what is shared is stored once"
