"""From a model's name to a config that is valid, suits the model, and says what to expect."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from leanserve.bases.loaded import LoadedBase
from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.config.data_section import SyntheticData
from leanserve.config.schema import ServiceConfig, read_config
from leanserve.contracts import Json, ModelSpec, OnnxModel, TensorSpec, TorchModel
from leanserve.errors import ConfigError, PassFailed
from leanserve.evaluation.intervals import paired_difference
from leanserve.hardware import Hardware
from leanserve.init import writing
from leanserve.init.data_argument import ToldColumns, data_section, data_seen
from leanserve.init.model_argument import Hints, base_section
from leanserve.init.profile import likely_state
from leanserve.init.reach import Reach
from leanserve.init.rehearsal import Rehearsed, refused_variants, rehearsed
from leanserve.init.suggestions import Suggestion, suggest
from leanserve.init.writing import GATE_ROWS, MAX_DROP, is_unfinished, write_config
from leanserve.passes.base import Applied
from leanserve.passes.families.lowrank.lowrank_conv import LowrankConv
from leanserve.passes.toolkit import lowering
from tiny_graphs import graph, random, write

SOURCE = """
from torch import nn

def images():
    blocks = [nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()) for _ in range(4)]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3)
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), *blocks, *head)

def depthwise():
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)) for _ in range(4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

def chances():
    return nn.Sequential(nn.Linear(6, 3), nn.Softmax(dim=1))

def late():
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(8)) for _ in range(4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))

def dense():
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))

class Last(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(8, 3)
    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])

def recurrent():
    return Last(nn.LSTM(6, 8, batch_first=True))

def mixing():
    return nn.Sequential(nn.Linear(6, 3), nn.Softmax(0))
"""
EVERYTHING = frozenset({"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"})
IMAGES = Hints(image="16x16")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "init_model.py").write_text(SOURCE)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield tmp_path
    sys.modules.pop("init_model", None)


@pytest.fixture
def unrehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is suggested is written: trying it takes long, and is what other tests look at."""
    monkeypatch.setattr(writing, "rehearsed", lambda _, suggestions: Rehearsed(tuple(suggestions), ()))


def written(path: Path, model: str, hints: Hints = Hints(), data: Path | None = None) -> ServiceConfig:  # noqa: B008
    write_config(model, path, hints, data)
    return read_config(path)


def kinds(config: ServiceConfig) -> dict[str, list[str]]:
    return {variant.name: [step.kind for step in variant.passes] for variant in config.variants}


@pytest.mark.usefixtures("unrehearsed")
def test_a_shipped_base_gets_a_ladder_with_its_own_data(tmp_path: Path) -> None:
    config = written(tmp_path / "c.yaml", "digits")
    assert config.data is None
    assert config.gate.max_drop is not None, "digits has labels"
    assert len(config.variants) >= 5
    assert config.variants[0].passes == ()
    assert "distill" in kinds(config)["pruned-int8"]
    assert kinds(config)["shallow-int8"][:2] == ["student", "distill"]


@pytest.mark.usefixtures("unrehearsed")
def test_what_the_model_is_made_of_decides(folder: Path) -> None:
    convolutional = kinds(written(folder / "a.yaml", "init_model:images", IMAGES))
    assert convolutional["onnx"] == ["fold_bn", "onnxruntime"]
    assert "lowrank-int8" in convolutional
    assert "pruned-int8" not in convolutional, "nothing to train on in synthetic rows"
    depthwise = kinds(written(folder / "b.yaml", "init_model:depthwise", IMAGES))
    assert "lowrank-int8" not in depthwise
    assert depthwise["onnx"] == ["onnxruntime"], "no batch norms to fold"
    dense = kinds(written(folder / "c.yaml", "init_model:dense", Hints(shapes=("x=6",))))
    assert dense["int8"] == ["quantize_dynamic", "onnxruntime"]
    assert min(map(len, (convolutional, depthwise, dense))) >= 5


@pytest.mark.usefixtures("unrehearsed")
def test_rows_that_change_each_other_are_kept_apart_and_the_file_says_so(folder: Path) -> None:
    lengths = written(folder / "a.yaml", "init_model:recurrent", Hints(shapes=("x=?,6",)))
    alone = written(folder / "b.yaml", "init_model:mixing", Hints(shapes=("x=6",)))
    assert [getattr(config.base, "rows", "") for config in (lengths, alone)] == ["one_length", "one"]
    assert "lets rows of a batch change each other" in (folder / "a.yaml").read_text()
    with pytest.raises(ConfigError, match="does not run on x"):
        write_config("init_model:mixing", folder / "c.yaml", Hints(shapes=("x=5",)), None)


@pytest.mark.usefixtures("unrehearsed")
def test_a_machine_without_instructions_is_not_offered_what_would_be_emulated(folder: Path) -> None:
    seen = write_config("init_model:images", folder / "a.yaml", IMAGES, None)
    profile, offered = seen.profile, seen.suggestions
    everything = Hardware("x", 1, tuple(EVERYTHING))
    assert "bf16" in {suggestion.name for suggestion in suggest(profile, everything, trainable=False)}
    encoder = dataclasses.replace(profile, shape="attention")
    taught = [suggestion.name for suggestion in suggest(encoder, everything, trainable=True)]
    assert "student-int8" in taught
    assert "shallow-int8" not in taught
    poor = suggest(profile, Hardware("x", 1, ("avx2",)), trainable=False)
    assert "bf16" not in {suggestion.name for suggestion in poor}
    assert "no fast int8" in next(suggestion.expect for suggestion in poor if suggestion.name == "int8")
    assert offered[0].name == "float"


@pytest.mark.usefixtures("unrehearsed")
def test_openvino_is_offered_where_it_is_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = write_config("init_model:images", folder / "a.yaml", IMAGES, None)

    def offered(*flags: str) -> dict[str, list[str]]:
        found = suggest(seen.profile, Hardware("x", 1, flags), trainable=False)
        return {item.name: [step["kind"] for step in item.passes] for item in found}

    assert offered(*EVERYTHING)["int8-openvino"] == ["fold_bn", "quantize_static", "openvino"]
    assert offered(*EVERYTHING)["bf16-openvino"] == ["fold_bn", "openvino"]
    assert "bf16-openvino" not in offered("avx2", "avx512_vnni")
    monkeypatch.setattr("leanserve.passes.families.runtime.openvino.find_spec", lambda _: None)
    assert not any(name.endswith("openvino") for name in offered(*EVERYTHING))


@pytest.mark.usefixtures("unrehearsed")
def test_data_is_looked_at_before_it_is_written_down(folder: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3), np.uint8)
    np.savez(folder / "rows.npz", photos=rows, y=np.arange(40) % 3)
    (folder / "labels.txt").write_text("a\nb\nc\n")
    hints = Hints(image="16x16", labels=folder / "labels.txt")
    config = written(folder / "c.yaml", "init_model:images", hints, folder / "rows.npz")
    assert yaml.safe_load((folder / "c.yaml").read_text())["data"] == {
        "arrays": "rows.npz",
        "inputs": "photos",
        "labels": "y",
        "splits": {"gate": GATE_ROWS},
    }
    text = (folder / "c.yaml").read_text()
    assert re.search(r"# The gate split has \d+ rows: a loss below some \d+\.\d points cannot be told", text)
    assert config.gate.max_drop is not None
    assert "pruned-int8" in kinds(config)
    np.savez(folder / "wrong.npz", photos=rows[..., :2], y=np.arange(40))
    with pytest.raises(ConfigError, match=r"photos.*d\.yaml has a TODO for it, and random rows"):
        write_config("init_model:images", folder / "d.yaml", hints, folder / "wrong.npz")
    assert (folder / "d.yaml").read_text().startswith("# TODO: data: ")
    assert is_unfinished(folder / "d.yaml")
    assert read_config(folder / "d.yaml").data == SyntheticData(synthetic=64), "nothing is missing but what is to do"


@pytest.mark.usefixtures("unrehearsed")
def test_what_the_outputs_mean_is_written_with_the_evidence(folder: Path) -> None:
    (folder / "labels.txt").write_text("a\nb\nc\n")
    path = folder / "a.yaml"
    row = Hints(shapes=("x=6",), labels=folder / "labels.txt")
    assert written(path, "init_model:chances", row).gate.min_agreement == 0.98
    assert yaml.safe_load(path.read_text())["base"]["outputs"] == {"probabilities": "probabilities"}
    assert "# Output probabilities: probabilities, its last operator is one for that." in path.read_text()
    path = folder / "b.yaml"
    config = written(path, "init_model:dense", Hints(shapes=("x=6",)))
    assert config.gate.min_agreement == 0.95
    assert yaml.safe_load(path.read_text())["base"]["outputs"] == {"output": "values"}
    assert "1 - the error of the worst channel" in path.read_text()
    told = written(folder / "c.yaml", "init_model:dense", Hints(shapes=("x=6",), meanings=("vector=embedding",)))
    assert told.gate.min_agreement == 0.99
    assert yaml.safe_load((folder / "c.yaml").read_text())["base"]["outputs"] == {"vector": "embedding"}


@pytest.mark.parametrize(
    ("argument", "section"),
    [
        ("timm:resnet18", {"timm": "resnet18"}),
        ("transformers:org/name", {"transformers": "org/name"}),
        ("a.b:c", {"python": "a.b:c"}),
        ("digits", {"shipped": "digits"}),
    ],
)
def test_forms_of_the_argument(tmp_path: Path, argument: str, section: dict[str, str]) -> None:
    assert base_section(argument, Hints(), tmp_path) == section


def test_files_are_named_relative_to_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "net.onnx").write_bytes(b"")
    (tmp_path / "w.pt").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert base_section("models/net.onnx", Hints(), tmp_path / "configs") == {"onnx": "../models/net.onnx"}
    assert base_section("timm:x", Hints(weights="w.pt"), tmp_path)["weights"] == "w.pt"
    assert base_section("timm:x", Hints(weights="random"), tmp_path)["weights"] == "random"
    chosen = base_section("timm:x", Hints(weights="w.pt", weights_key="model_ema"), tmp_path)
    assert chosen == {"timm": "x", "weights": "w.pt", "weights_key": "model_ema"}
    assert base_section("transformers:x", Hints(task="embedding"), tmp_path)["task"] == "embedding"
    with pytest.raises(ConfigError, match=r"no architecture.*--weights w\.pt"):
        base_section("w.pt", Hints(), tmp_path)


def test_a_hint_that_the_model_has_no_use_for_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^base\.task: Extra inputs are not permitted$"):
        write_config("a:b", tmp_path / "c.yaml", Hints(task="embedding"), None)
    with pytest.raises(ConfigError, match=r"^base: .*weights_key chooses among the weights of a file"):
        write_config("a:b", tmp_path / "c.yaml", Hints(weights_key="ema"), None)


@pytest.mark.parametrize(
    ("argument", "hints", "message"),
    [
        ("resnet fifty", Hints(), "names no model; give a shipped base .*timm:NAME"),
        ("none.onnx", Hints(), "no file none.onnx"),
        ("a:b", Hints(image="224"), "--image 224: give WIDTHxHEIGHT"),
        ("a:b", Hints(shapes=("x",)), "--input x: give NAME=SIZES"),
        ("a:b", Hints(meanings=("y=classes",)), "--meaning y=classes: give NAME=MEANING, one of logits, probabilities"),
    ],
)
def test_what_names_nothing_is_refused(tmp_path: Path, argument: str, hints: Hints, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        base_section(argument, hints, tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "classes", "columns"),
    [
        ("a.csv", "A man eats food.,A man is eating.,4.2\nNo.,A plane takes off.,0\n", False, [0, 1, 2]),
        ("a.csv", "sentence,label\nso good it hurts,1\nvery very bad,0\n", True, ["sentence", None, "label"]),
        ("a.tsv", "a text of some length\nanother text\n", False, [0, None, None]),
        (
            "a.jsonl",
            '{"id": "x", "review": "long enough a text"}\n{"id": "y", "review": "b"}\n',
            True,
            ["review", None, "id"],
        ),
    ],
)
def test_columns_of_tables_are_guessed(
    tmp_path: Path,
    name: str,
    text: str,
    classes: Literal[True, False],
    columns: list[str | int | None],
) -> None:
    (tmp_path / name).write_text(text)
    spec = ModelSpec((), (TensorSpec("x", "float32", (2,)),), ("a", "b") if classes else ())
    section = data_section(tmp_path / name, spec, tmp_path)
    assert [section.get(key) for key in ("text", "pair", "label")] == columns


REVIEWS = "id,remark,review,stars\n1,of no interest whatsoever to any,good,5\n2,another that is long enough,bad,1\n"


@pytest.mark.parametrize(
    ("told", "columns"),
    [
        (ToldColumns(), ["review", None, "stars"]),
        (ToldColumns(text="remark", label="id"), ["remark", None, "id"]),
        (ToldColumns(text="remark", pair="review"), ["remark", "review", "stars"]),
    ],
)
def test_columns_are_matched_by_name_and_may_be_told(
    tmp_path: Path, told: ToldColumns, columns: list[str | None]
) -> None:
    (tmp_path / "a.csv").write_text(REVIEWS)
    spec = ModelSpec((), (TensorSpec("x", "float32", (2,)),))
    section = data_section(tmp_path / "a.csv", spec, tmp_path, told)
    assert [section.get(key) for key in ("text", "pair", "label")] == columns
    with pytest.raises(ConfigError, match="--label grade: there is no such column; the file has id, remark, review"):
        data_section(tmp_path / "a.csv", spec, tmp_path, ToldColumns(label="grade"))


CARS = ModelSpec((TensorSpec("Make", "string", (1,)), TensorSpec("rest", "float32", (2,))), (), ("cheap", "dear"))


@pytest.mark.parametrize(
    ("text", "told", "section"),
    [
        ("make,km,age,label\nFiat,10,3,cheap\n", ToldColumns(), {"inputs": {"Make": "make", "rest": ["km", "age"]}}),
        ("km,make,age,label\n1,Fiat,3,dear\n", ToldColumns(inputs=("rest=age,km",)),
         {"inputs": {"Make": "make", "rest": ["age", "km"]}}),
    ],
)  # fmt: skip
def test_columns_of_a_table_are_the_inputs(tmp_path: Path, text: str, told: ToldColumns, section: Json) -> None:
    (tmp_path / "a.csv").write_text(text)
    found = data_section(tmp_path / "a.csv", CARS, tmp_path, told)
    assert found == {"table": "a.csv", **section, "label": "label"}


def test_a_table_whose_columns_cannot_be_told_apart_asks_for_their_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("brand,km,age,label\nFiat,10,3,cheap\n")
    with pytest.raises(ConfigError, match=r"has the columns brand, km, age, the model takes Make \(1\), rest \(2\)"):
        data_section(tmp_path / "a.csv", CARS, tmp_path)
    with pytest.raises(ConfigError, match="--inputs make: there is no such column"):
        data_section(tmp_path / "a.csv", CARS, tmp_path, ToldColumns(inputs=("Make=make",)))


TWO = ModelSpec((TensorSpec("input_ids", "float32", (2,)), TensorSpec("mask", "float32", (2,))), ())


@pytest.mark.parametrize(
    ("names", "told", "inputs"),
    [
        (("input_ids", "mask", "y"), ToldColumns(), None),
        (("InputIds", "mask"), ToldColumns(), {"input_ids": "InputIds", "mask": "mask"}),
        (("tokens", "mask", "label"), ToldColumns(), {"input_ids": "tokens", "mask": "mask"}),
        (("a", "b"), ToldColumns(inputs=("input_ids=b", "mask=a")), {"input_ids": "b", "mask": "a"}),
    ],
    ids=["the same", "other letters", "the one that is left", "as told"],
)
def test_arrays_are_matched_with_inputs(
    tmp_path: Path, names: tuple[str, ...], told: ToldColumns, inputs: dict[str, str] | None
) -> None:
    np.savez(tmp_path / "a.npz", **dict.fromkeys(names, np.zeros((4, 2), np.float32)))  # type: ignore[arg-type]
    assert data_section(tmp_path / "a.npz", TWO, tmp_path, told).get("inputs") == inputs


def test_arrays_that_match_nothing_ask_to_be_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.zeros((4, 2)), b=np.zeros((4, 2)))
    with pytest.raises(ConfigError, match=r"has the arrays a, b, the model takes input_ids, mask; .* --inputs"):
        data_section(tmp_path / "a.npz", TWO, tmp_path)
    with pytest.raises(ConfigError, match="give INPUT=ARRAY for each"):
        data_section(tmp_path / "a.npz", TWO, tmp_path, ToldColumns(inputs=("a",)))


QUANTIZED = """
agraph (int64[N, 3] ids) => (float[N, 3] y) {
    vectors = Gather (table, ids)
    pooled = ReduceMax <axes = [1], keepdims = 0> (vectors)
    whole, scale, zero = DynamicQuantizeLinear (pooled)
    product = MatMulInteger (whole, weight, zero)
    values = Cast <to = 1> (product)
    y = Mul (values, scale)
}
"""


def test_a_graph_whose_rows_share_a_scale_gets_every_row_a_batch_of_its_own(folder: Path) -> None:
    weight = np.array([[90, -40, 7], [-80, 60, 9], [70, -50, -3], [-60, 44, 5]], np.int8)
    weights: dict[str, np.ndarray] = {"table": 1 + 2 * random(2, 4), "weight": weight}
    path = write(folder / "m.onnx", graph(QUANTIZED, weights))
    assert write_config(str(path), folder / "c.yaml", Hints(), None).profile.spec.rows == "one"
    assert "  rows: one\n" in (folder / "c.yaml").read_text()


def test_a_gain_is_scaled_by_what_a_pass_reaches(folder: Path) -> None:
    told = Suggestion("int8", (), "{gain} the variant onnx", (2, 2.5))
    assert told.expect == "2-2.5x the variant onnx"
    half, all_of_it = (told._replace(reach=Reach(eight_bits=share)).expect for share in (0.5, 1.0))
    assert half == "1.3-1.4x the variant onnx; 8 bits reach 50% of the arithmetic"
    assert all_of_it == "2-2.5x the variant onnx; 8 bits reach 100% of the arithmetic"
    bf16 = Suggestion("bf16", (), "{gain} torch", (1.5, 4), reach=Reach(narrowed=1.24))
    assert bf16.expect == "1.2x torch; as measured on a few rows when it was tried"
    text = "agraph (float[N, 4] x) => (float[N, 4] y) <float[4, 4] w = {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, "
    text += "1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6}> { a = MatMul (x, w) b = Mul (a, a) y = MatMul (b, w) }"
    seen = write_config(str(write(folder / "m.onnx", graph(text))), folder / "c.yaml", Hints(), None)
    int8 = next(item for item in seen.suggestions if item.name == "int8")
    assert int8.reach.eight_bits == 1.0
    assert "8 bits reach 100% of the arithmetic" in (folder / "c.yaml").read_text()


def test_so_is_one_by_foldable_norms_convolutions_and_what_is_left() -> None:
    layout = Suggestion("channels-last", (), "{gain} torch", (1.1, 1.2), (1.1, 1.2))
    assert layout.expect == "1.2-1.4x torch"
    partly = layout._replace(reach=Reach(convolutions=0.5, norms=(1, 4)))
    assert partly.expect == ("1.1x torch; convolutions are 50% of the arithmetic; 1 of 4 batch norms can be folded")
    fewer = Suggestion("lowrank-int8", (), "{gain} the variant int8", reach=Reach(eight_bits=0.9, left=0.5))
    assert fewer.expect == (
        "1.4-1.7x the variant int8; 8 bits reach 90% of the arithmetic; 50% of the arithmetic is left"
    )


@pytest.fixture
def images(folder: Path) -> LoadedBase:
    (folder / "i.yaml").write_text(
        "base: {python: init_model:images, inputs: {x: {shape: [3, 16, 16]}}}\ndata: {synthetic: 8}\n"
        "variants: [{name: float}]\n"
    )
    config = read_config(folder / "i.yaml")
    return open_base(Origin(base=config.base, data=config.data, folder=folder))


def test_what_passes_reach_is_found_by_trying_them(images: LoadedBase) -> None:
    fold, fewer = {"kind": "fold_bn"}, {"kind": "lowrank_conv", "macs": 0.6, "approximate": "weight"}
    tried = [Suggestion("layout", (fold, {"kind": "channels_last"}), ""), Suggestion("lowrank", (fewer,), "")]
    layout, lowrank = (item.reach for item in rehearsed(images, tried).kept)
    assert (layout.norms, layout.left) == ((4, 4), None)
    assert layout.convolutions == pytest.approx(1.0, abs=0.001)
    assert lowrank.left == pytest.approx(0.6, abs=0.05)
    assert (lowrank.norms, lowrank.convolutions, lowrank.eight_bits) == (None, None, None)


def test_what_variants_begin_with_is_exported_once_and_fails_once(
    images: LoadedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported, asked = [], []

    def export(model: TorchModel, path: Path) -> OnnxModel:
        exported.append(model)
        return lowering_export(model, path)

    def apply(*arguments: Any) -> Applied:
        asked.append(arguments)
        raise PassFailed("there is no rank to spare")

    lowering_export = lowering.export_onnx
    monkeypatch.setattr(lowering, "export_onnx", export)
    monkeypatch.setattr(LowrankConv, "apply", apply)
    fold, run, fewer = ({"kind": kind} for kind in ("fold_bn", "onnxruntime", "lowrank_conv"))
    passes = (
        (fold, run),
        (fold, {**run, "spinning": "off"}),
        ({**fewer, "rank": 2}, run),
        ({**fewer, "rank": 2}, fold),
    )
    found = rehearsed(images, [Suggestion(str(index), steps, "") for index, steps in enumerate(passes)], spare=())
    assert [item.name for item in found.kept] == ["0", "1"]
    assert [item.reason for item in found.left] == ["there is no rank to spare"] * 2
    assert (len(exported), len(asked)) == (1, 1)


def test_gate_rows_are_enough_for_the_limit_that_is_written() -> None:
    rows = np.zeros(GATE_ROWS, bool)
    half = round(GATE_ROWS * 0.01)
    ours, theirs = rows.copy(), rows.copy()
    ours[:half], theirs[half : 2 * half] = True, True
    assert paired_difference(theirs, ours).high == pytest.approx(MAX_DROP, rel=0.15)


def test_a_config_is_rehearsed_before_it_is_believed(folder: Path) -> None:
    (folder / "c.yaml").write_text(
        "base: {python: init_model:dense, inputs: {x: {shape: [6]}}}\ndata: {synthetic: 64}\nvariants:\n"
        "  - {name: float}\n  - {name: onnx, passes: [{kind: onnxruntime}]}\n"
        "  - {name: thin, passes: [{kind: lowrank_linear, macs: 0.001}]}\n"
        "  - {name: thinner, parent: thin, passes: [{kind: onnxruntime}]}\n"
    )
    config = read_config(folder / "c.yaml")
    base = open_base(Origin(base=config.base, data=config.data, folder=folder))
    left = refused_variants(base, config)
    assert [item.name for item in left] == ["thin", "thinner"]
    assert "cannot be reached" in left[0].reason


@pytest.mark.usefixtures("unrehearsed")
def test_a_folder_of_images_is_counted_and_named(folder: Path) -> None:
    for number in range(12):
        path = folder / "photos" / "abc"[number % 3] / f"{number}.{('png', 'jpg')[number % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(path)
    (folder / "photos/a/notes.txt").write_text("no image")
    (folder / "labels.txt").write_text("a\nb\nc\n")
    hints = Hints(image="16x16", labels=folder / "labels.txt")
    config = written(folder / "c.yaml", "init_model:images", hints, folder / "photos")
    assert yaml.safe_load((folder / "c.yaml").read_text())["data"] == {
        "images": "photos",
        "splits": {"gate": GATE_ROWS},
    }
    assert config.gate.max_drop is not None
    seen = "12 images in 3 folders (a, b, c): 6 .jpg, 6 .png; 1 other files are skipped: 1 .txt"
    assert data_seen(folder / "photos") == seen
    assert data_seen(folder / "labels.txt") is data_seen(None) is None
    (folder / "nothing").mkdir()
    with pytest.raises(ConfigError, match=r"there is no image in .*nothing"):
        write_config("init_model:images", folder / "d.yaml", hints, folder / "nothing")


@pytest.mark.soak
def test_the_command_writes_a_file_once_and_checks_out(tmp_path: Path) -> None:
    def leanserve(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "leanserve", *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )

    first = leanserve("init", "digits", "--output", "mine.yaml")
    assert first.returncode == 0, first.stderr
    assert "next: leanserve serve --config mine.yaml" in first.stderr
    checked = leanserve("check", "--config", "mine.yaml")
    assert "no problem found" in checked.stdout, checked.stderr
    assert (tmp_path / "mine.yaml").rename(tmp_path / "leanserve.yaml")
    usual = leanserve("check")
    assert "leanserve.yaml: " in usual.stdout, "what init writes is every command's default"
    assert (tmp_path / "leanserve.yaml").rename(tmp_path / "mine.yaml")
    again = leanserve("init", "digits", "--output", "mine.yaml")
    assert again.returncode == 2
    assert "mine.yaml exists and is not replaced" in again.stderr
    lost = leanserve("init", "resnet fifty")
    assert lost.returncode == 2
    assert "names no model" in lost.stderr
    assert "Traceback" not in lost.stderr


def test_what_cannot_be_made_of_the_model_is_left_out_with_the_reason(tmp_path: Path) -> None:
    text = "agraph (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }"
    seen = write_config(str(write(tmp_path / "m.onnx", graph(text))), tmp_path / "c.yaml", Hints(), None)
    kept = [suggestion.name for suggestion in seen.suggestions]
    assert kept[0] == "float"
    assert not any(name.startswith("int8") for name in kept)
    assert {item.name for item in seen.left} == {"int8", "int8-percentile", "int8-minmax", "int8-openvino"}
    assert all("finds no convolution or linear layer" in item.reason for item in seen.left)
    assert (
        "  # Left out: int8, which does not suit this model: quantize_static finds no"
        in (tmp_path / "c.yaml").read_text()
    )
    assert [variant.name for variant in read_config(tmp_path / "c.yaml").variants] == kept


def test_batch_norms_that_cannot_be_folded_are_left_as_they_are(folder: Path) -> None:
    found = kinds(written(folder / "c.yaml", "init_model:late", IMAGES))
    assert found["onnx"] == ["onnxruntime"]
    assert found["int8"] == ["quantize_static", "onnxruntime"]
    assert "channels-last" in found


def test_a_layer_without_rank_to_spare_is_not_factorised(folder: Path) -> None:
    seen = write_config("init_model:dense", folder / "c.yaml", Hints(shapes=("x=6",)), None)
    assert [item.name for item in seen.left] == ["lowrank"]
    assert "cannot be reached" in seen.left[0].reason


def test_what_is_missing_is_written_as_a_line_to_do(folder: Path) -> None:
    path = folder / "c.yaml"
    with pytest.raises(ConfigError, match=r"the input of the model is not known.*c\.yaml has a TODO for it"):
        write_config("init_model:dense", path, Hints(), None)
    text = path.read_text()
    assert text.startswith("# TODO: base: the input of the model is not known")
    assert "  # inputs: {NAME: {dtype: float32, shape: [SIZES OF ONE ROW]}} # TODO: one per input" in text
    assert read_config(path).variants[0].name == "float", "nothing is missing but what is to do"
    assert is_unfinished(path)
    write_config("init_model:dense", path, Hints(shapes=("x=6",)), None)
    assert not is_unfinished(path)


@pytest.mark.usefixtures("unrehearsed")
def test_what_was_guessed_is_told(folder: Path) -> None:
    remarks = write_config("init_model:images", folder / "c.yaml", IMAGES, None).remarks
    assert "mean [0.485, 0.456, 0.406] and std [0.229, 0.224, 0.225] are a guess" in remarks[0]
    assert any(remark.startswith("Random rows") for remark in remarks)


def test_a_factory_gets_its_arguments(folder: Path) -> None:
    (folder / "init_model.py").write_text(
        SOURCE + "\ndef sized(width, name):\n    return nn.Linear(width, len(name))\n"
    )
    config = written(folder / "c.yaml", "init_model:sized", Hints(shapes=("x=5",), arguments=("width=5", "name=abc")))
    assert getattr(config.base, "arguments", None) == {"width": 5, "name": "abc"}
    with pytest.raises(ConfigError, match="--argument width: give NAME=VALUE"):
        base_section("a:b", Hints(arguments=("width",)), folder)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_program_is_told_with_the_way_to_export(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(3, 2), torch.ones(1, 3)), str(tmp_path / "m.pt"))  # type: ignore[no-untyped-call]
    with pytest.raises(ConfigError, match=r"is a TorchScript program.*torch\.onnx\.export\(torch\.jit\.load"):
        base_section(str(tmp_path / "m.pt"), Hints(), tmp_path)


@pytest.mark.parametrize(
    ("inputs", "outputs", "state"),
    [
        ({"input": (512,), "state": (2, 128), "sr": ()}, {"output": (1,), "stateN": (2, 128)}, {"state": "stateN"}),
        ({"x": (512,), "h": (64,), "c": (64,)}, {"p": (1,), "hn": (64,), "cn": (64,)}, {"h": "hn", "c": "cn"}),
        ({"x": (4,), "past_key": (8,)}, {"y": (4,), "present_key": (8,)}, {"past_key": "present_key"}),
        ({"x": (4,), "memory": (8,)}, {"y": (4,), "z": (8,)}, {"memory": "z"}),
        ({"x": (4,), "m": (8,)}, {"y": (4,), "z": (8,)}, {}),
        ({"x": (4,), "state": (None,)}, {"y": (4,), "state_out": (None,)}, {}),
        ({"input": (4,)}, {"output": (4,)}, {}),
    ],
)
def test_state_is_told_by_names_and_sizes(inputs: Any, outputs: Any, state: dict[str, str]) -> None:
    taken, given = (tuple(TensorSpec(name, "float32", shape) for name, shape in x.items()) for x in (inputs, outputs))
    assert likely_state(ModelSpec(taken, given)) == state
