"""Models that take and give texts, and tables of numbers and words as their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from leanserve.bases.loaded import LoadedBase
from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.contracts import Array, Share
from leanserve.errors import BadInput, ConfigError
from leanserve.evaluation.batch_dependence import batch_dependence
from leanserve.evaluation.fidelity import fidelity
from leanserve.experiments.answer_pairs import AgreementRule, pair_answers
from leanserve.runtime.formats import open_backend
from tiny_graphs import write
from word_graphs import CITIES, CLASSES, KINDS, lower_case, one_hot

SOLD = {(town, kind): "yes" if town == "Bern" or kind == "a" else "no" for town in CITIES for kind in KINDS}
TABLE = "\n".join(["number,town,kind,sold", *(f"7,{town},{kind},{sold}" for (town, kind), sold in SOLD.items())])
COLUMNS = {"inputs": {"x": ["town", "kind"]}, "label": "sold"}


def opened(folder: Path, model: onnx.ModelProto, data: dict[str, Any] | None = None, **base: Any) -> LoadedBase:
    write(folder / "m.onnx", model)
    declared = {"base": {"onnx": "m.onnx", **base}, "data": data or {"synthetic": 8}, "folder": folder}
    return open_base(Origin.model_validate(declared))


def answers(base: LoadedBase, *inputs: Array) -> tuple[Array, ...]:
    backend = open_backend(base.model(), Share(1))
    try:
        return backend.run(inputs).outputs
    finally:
        backend.close()


def texts(*rows: list[str]) -> Array:
    return np.array(rows, object)


def test_a_graph_tells_its_words_column_by_column_and_its_classes(tmp_path: Path) -> None:
    base = opened(tmp_path, one_hot())
    [item] = base.spec.inputs
    assert (item.dtype, item.shape, item.words) == ("string", (2,), (CITIES, KINDS))
    assert base.spec.labels == CLASSES
    assert [(item.name, item.dtype, item.meaning) for item in base.spec.outputs] == [
        ("label", "string", "values"),
        ("scores", "float32", "probabilities"),
    ]
    drawn = base.spec.example(50)[0]
    assert {*drawn[:, 0]} == {*CITIES}
    assert {*drawn[:, 1]} == {*KINDS}
    label, scores = answers(base, texts(["Bern", "c"], ["Rome", "a"]))
    assert label.tolist() == [CLASSES[best] for best in scores.argmax(axis=1)]
    assert base.codec.encode((label, scores))[0]["label"] == label[0]


def test_the_labels_of_a_graph_may_be_named_otherwise_or_left_out(tmp_path: Path) -> None:
    assert opened(tmp_path, one_hot(), labels=["nein", "ja"]).spec.labels == ("nein", "ja")
    base = opened(tmp_path, one_hot(), labels=[])
    outputs = answers(base, texts(["Bern", "c"]))
    assert base.codec.encode(outputs)[0]["outputs"]["label"] == outputs[0][0]


def test_a_word_that_the_model_was_not_made_for_is_the_clients_mistake(tmp_path: Path) -> None:
    base = opened(tmp_path, one_hot())
    with pytest.raises(BadInput, match="a category that the model was not made for"):
        answers(base, texts(["Oslo", "a"]))
    answers(opened(tmp_path, one_hot(strict=False)), texts(["Oslo", "a"]))


def test_case_is_folded_without_a_language_that_must_be_installed(tmp_path: Path) -> None:
    base = opened(tmp_path, lower_case())
    assert base.spec.inputs[0].words == (("red", "blue"),)
    assert answers(base, np.array(["RED", "blue", "Ä"], object))[0].tolist() == [1, 2, 0]


def test_answers_in_words_are_compared_by_equality(tmp_path: Path) -> None:
    base = opened(tmp_path, one_hot())
    rows = (base.spec.example(40)[0],)
    theirs = answers(base, *rows)
    ours = (theirs[0].copy(), theirs[1])
    ours[0][:10] = "maybe"
    found = fidelity(ours, theirs, base.spec.outputs)
    assert found[0].agreement == 0.75
    assert found[1].agreement == 1.0
    assert fidelity((np.full(40, "yes"), theirs[1]), theirs, base.spec.outputs)[0].constant
    pairs = pair_answers(ours, theirs, base.spec.outputs, AgreementRule())
    assert (pairs.sums.rows, pairs.sums.agreed, pairs.sums.broken) == (40, 30, 0)
    backend = open_backend(base.model(), Share(1))
    assert batch_dependence(backend, base.spec, rows) < 1e-5
    backend.close()


def test_rows_of_a_table_are_words_and_numbers_by_their_columns(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(TABLE)
    base = opened(tmp_path, one_hot(), {"table": "t.csv", **COLUMNS, "splits": {"calibration": 2, "gate": 4}})
    batch = next(base.data("gate").batches(8))
    assert batch.labels is not None
    assert [SOLD[town, kind] for town, kind in batch.inputs[0]] == [CLASSES[number] for number in batch.labels]
    assert 0 <= base.score(answers(base, *batch.inputs), batch.labels) <= 1


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"inputs": {}}, r"data.inputs: the input 'x' takes 2 values per row, and has 1 columns \(x\)"),
        ({"inputs": {"y": "town"}}, "data.inputs: the model has no input 'y'; it takes x"),
        ({"inputs": {"x": ["town", "sort"]}}, "t.csv:1: no column is called 'sort'"),
        ({"table": "t.xls"}, "data.table: .*t.xls is none of .csv, .tsv, .jsonl"),
    ],
)
def test_columns_that_do_not_fit_are_named(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    (tmp_path / "t.csv").write_text(TABLE)
    with pytest.raises(ConfigError, match=message):
        next(opened(tmp_path, one_hot(), {"table": "t.csv", **COLUMNS, **section}).data("gate").batches(8))
