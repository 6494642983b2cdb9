from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from leanserve.contracts import BuildContext, CandidateQuality, Json, Model, OnnxModel, TorchModel
from leanserve.errors import PassFailed
from leanserve.evaluation.candidates import CandidateEvaluator
from leanserve.passes.families.quantize.quantize_select import QuantizeSelect, _Search
from leanserve.passes.toolkit.layer_damage import Damage, damage, ranked
from leanserve.passes.toolkit.lowering import export_onnx
from leanserve.passes.toolkit.notes import Notes
from structural_nets import Perceptron, row_base
from tiny_base import TinyBase, context_of, lively

SPOILT = "norm/Gemm"
"""The first layer, called after the norm that is folded into it."""


def spoilt_base() -> TinyBase:
    """Its first layer reads a large number that matters little: 8 bits of its inputs tell little of the rest."""
    base = row_base()
    inputs, module = base.inputs[0].copy(), lively(Perceptron(), seed=2)
    inputs[:, 0] = 4000 + inputs[:, 0]
    with torch.no_grad():
        module.get_parameter("first.weight")[:, 0] *= 1e-4
    return replace(base, teacher=module, inputs=(inputs,))


BASE = spoilt_base()


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return export_onnx(TorchModel(BASE.torch_module(), BASE.spec), tmp_path_factory.mktemp("net") / "model.onnx")


def select(
    net: OnnxModel, folder: Path, context: BuildContext | None = None, **options: object
) -> tuple[OnnxModel, Mapping[str, Json], Mapping[str, float]]:
    pass_ = QuantizeSelect.model_validate({"observer": "minmax", **options})
    applied = pass_.apply(net, context or context_of(BASE, folder))
    assert isinstance(applied.model, OnnxModel)
    return applied.model, applied.decisions, applied.facts


def test_the_layer_that_hurts_is_found_and_left_float(net: OnnxModel, tmp_path: Path) -> None:
    model, told, facts = select(net, tmp_path, max_drop=0.05)
    assert told["float_layers"] == [SPOILT]
    assert (facts["float_layers"], facts["layers"]) == (1, 3)
    assert facts["loss"] <= 0.05
    rows = told["tables"]["layers"]
    assert rows[0]["layer"] == SPOILT
    assert [row["kept"] for row in rows] == ["float", "int8", "int8"]
    assert rows[0]["KL, nats"] > 10 * rows[1]["KL, nats"]
    assert rows[0]["SQNR, dB"] < rows[1]["SQNR, dB"]
    search = [(row["layers in float"], row["loss of agreement"]) for row in told["tables"]["search"]]
    assert [count for count, _ in search] == [0, 1]
    assert search[0][1] > 0.05 >= search[1][1]
    floats = {node.name for node in onnx.load(model.path).graph.node if node.op_type == "Gemm"}
    assert SPOILT in floats
    evaluator = CandidateEvaluator(BASE, 1)
    assert 1 - evaluator(model).agreement == pytest.approx(facts["loss"])
    evaluator.close()


def test_what_bears_it_is_quantized_wholly(net: OnnxModel, tmp_path: Path) -> None:
    _, told, facts = select(net, tmp_path, max_drop=0.999)
    assert told["float_layers"] == []
    assert facts["float_layers"] == 0


def test_what_is_out_of_reach_is_told_with_what_was_reached(net: OnnxModel, tmp_path: Path) -> None:
    far = replace(
        context_of(BASE, tmp_path), evaluate=lambda model: CandidateQuality(70, None, 0.9 if model is net else 0.4)
    )
    text = r"max_drop 0.2 is out of reach: with 0 layers in float the loss of agreement is 0.5000; .* put smooth"
    with pytest.raises(PassFailed, match=text):
        select(net, tmp_path, far, max_drop=0.2, most=0.34)
    (tmp_path / "selection.json").unlink()
    with pytest.raises(PassFailed, match="by is score, but the calibration split has no labels"):
        select(net, tmp_path, far, by="score")


def test_the_score_decides_where_it_is_asked_for(net: OnnxModel, tmp_path: Path) -> None:
    asked: list[Model] = []

    def evaluate(model: Model) -> CandidateQuality:
        asked.append(model)
        return CandidateQuality(70, 0.9 if model is net else 0.895, 0.1)

    context = replace(context_of(BASE, tmp_path), evaluate=evaluate)
    _, told, _ = select(net, tmp_path, context, by="score")
    assert told["tables"]["search"] == [{"layers in float": 0, "loss of score": pytest.approx(0.005)}]


class Interrupted(Exception):
    """In the middle of the work."""


def test_an_interrupted_search_goes_on(net: OnnxModel, tmp_path: Path) -> None:
    (tmp_path / "once").mkdir()
    (tmp_path / "twice").mkdir()
    whole = select(net, tmp_path / "once", max_drop=0.05)
    runs: list[str] = []

    def stop(done: float, total: float, note: str = "") -> None:
        runs.append(note)
        if runs.count("quantizing layers one by one") == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        select(net, tmp_path, replace(context_of(BASE, tmp_path / "twice"), progress=stop), max_drop=0.05)
    known = json.loads((tmp_path / "twice" / "selection.json").read_text())
    assert len(known) == 2
    known["layer second/Gemm"]["sqnr_db"] = 12.34
    (tmp_path / "twice" / "selection.json").write_text(json.dumps(known))
    resumed = select(net, tmp_path / "twice", max_drop=0.05)
    assert resumed[1]["float_layers"] == whole[1]["float_layers"]
    assert 12.34 in [row["SQNR, dB"] for row in resumed[1]["tables"]["layers"]], "what was known is not measured again"


@pytest.mark.parametrize(
    ("needed", "tried"), [(0, [0]), (1, [0, 1]), (5, [0, 1, 2, 4, 8, 6, 5]), (8, [0, 1, 2, 4, 8, 6, 7])]
)
def test_the_search_tries_each_number_once(tmp_path: Path, needed: int, tried: list[int]) -> None:
    search = _Search(Notes(tmp_path / "notes.json"), lambda count: 0.0 if count >= needed else 1.0, 0.5)
    assert search.least(10) == needed
    assert [count for count, _ in search.trail] == tried
    assert search.least(10) == needed
    short = _Search(Notes(tmp_path / "other.json"), lambda _: 1.0, 0.5)
    assert short.least(3) is None
    assert [count for count, _ in short.trail] == [0, 1, 2, 3]


def test_damage_is_measured_per_output_and_ranked(net: OnnxModel) -> None:
    theirs = np.random.default_rng(0).standard_normal((20, 10)).astype(np.float32)
    noise = 0.1 * np.random.default_rng(1).standard_normal(theirs.shape).astype(np.float32)
    found = damage("a", [(theirs + noise,)], [(theirs,)], BASE.spec)
    assert found.sqnr_db == pytest.approx(20, abs=1)
    assert found.kl is not None
    assert 0 < found.kl < 0.02
    same = damage("b", [(theirs,)], [(theirs,)], BASE.spec)
    assert (same.sqnr_db, same.kl) == (200.0, 0.0)
    other = Damage("c", 40.0, 0.5)
    assert [item.layer for item in ranked([same, found, other], "sqnr")] == ["a", "c", "b"]
    assert [item.layer for item in ranked([same, found, other], "kl")] == ["c", "a", "b"]
    spec = replace(BASE.spec, outputs=(replace(BASE.spec.outputs[0], meaning="values"),))
    with pytest.raises(PassFailed, match="rank is kl, but no output has classes"):
        QuantizeSelect(rank="kl")._ranking(replace(net, spec=spec))
