"""`base: {transformers: ...}`: the library's own answers, what the files of a checkpoint say, and refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from leanserve.bases.loaded import LoadedBase
from leanserve.bases.opening import open_base, reopen_base
from leanserve.bases.origin import Origin
from leanserve.bases.sources.python_imports import make_torchvision_importable
from leanserve.bases.sources.transformers_model import TransformersSource
from leanserve.codecs.text import TextCodec
from leanserve.config.base_section import TransformersBase
from leanserve.contracts import Array, Arrays, TensorSpec
from leanserve.errors import ConfigError
from tiny_checkpoints import SHAPE, WORDS, write_classifier, write_encoder, write_pooling, write_tokenizer

TEXTS = ["the cat sat on the mat", "a dog", "a very big green tree and a red film was not good"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`encoder` and `classifier`, and a file of texts."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write_encoder(folder / "encoder")
    write_classifier(folder / "classifier", ("bad", "so so", "good"))
    (folder / "texts.csv").write_text("\n".join(f"the {word},{index % 3}" for index, word in enumerate(WORDS)))
    return folder


@pytest.fixture
def encoder(checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of the encoder, to be changed."""
    return Path(shutil.copytree(checkpoints / "encoder", tmp_path / "encoder"))


def opened(folder: Path, data: Any = None, cache: Path | None = None, **declared: Any) -> LoadedBase:
    """The base of a checkpoint; synthetic data unless others are given."""
    base = {"transformers": folder.name} | declared
    origin = {"base": base, "data": data or {"synthetic": 8}, "folder": folder.parent, "cache": cache}
    return open_base(Origin.model_validate(origin))


def source(folder: Path, **declared: Any) -> TransformersSource:
    return TransformersSource(TransformersBase.model_validate({"transformers": folder.name} | declared), folder.parent)


def tokens(base: LoadedBase) -> Arrays:
    assert isinstance(base.codec, TextCodec)
    return base.codec.arrays(base.codec.tokens(TEXTS))


def answers(base: LoadedBase) -> Array:
    with torch.inference_mode():
        found: Array = base.torch_module()(*map(torch.from_numpy, tokens(base))).numpy()
    return found


def of_library(kind: str, folder: Path, inputs: Arrays) -> Any:
    """What the library itself answers."""
    make_torchvision_importable()
    import transformers

    model = getattr(transformers, kind).from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(**dict(zip(("input_ids", "attention_mask"), map(torch.from_numpy, inputs), strict=True)))


def test_a_classifier_gives_the_logits_of_the_library(checkpoints: Path) -> None:
    data = {"texts": "texts.csv", "label": 1}
    base = opened(checkpoints / "classifier", data, name="reviews")
    assert base.name == "reviews"
    assert base.spec.labels == ("bad", "so so", "good")
    assert isinstance(base.codec, TextCodec)
    tokens_are = (0, max(base.codec.token_ids))
    bounds = [(item.name, item.values) for item in base.spec.inputs]
    assert bounds == [("input_ids", tokens_are), ("attention_mask", (0, 1))]
    assert base.spec.outputs == (TensorSpec("logits", "float32", (3,), meaning="logits"),)
    expected = of_library("BertForSequenceClassification", checkpoints / "classifier", tokens(base)).logits.numpy()
    np.testing.assert_allclose(answers(base), expected, atol=1e-6)
    assert np.ptp(expected, axis=0).min() > 1e-3
    labels = next(base.data("gate").batches(64)).labels
    assert labels is not None
    assert base.score((np.eye(3)[labels],), labels) == 1.0
    again = reopen_base(base.origin)
    assert again.digest == base.digest


def test_an_encoder_gives_the_mean_of_its_tokens_at_length_one(checkpoints: Path) -> None:
    base = opened(checkpoints / "encoder")
    assert (base.name, base.spec.labels, base.unit) == ("encoder", (), 1)
    assert base.spec.outputs == (TensorSpec("embedding", "float32", (32,), meaning="embedding"),)
    inputs = tokens(base)
    hidden = of_library("BertModel", checkpoints / "encoder", inputs).last_hidden_state.numpy()
    weights = inputs[1][:, :, None]
    mean = (hidden * weights).sum(1) / weights.sum(1)
    np.testing.assert_allclose(answers(base), mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)
    assert not any("pooler" in name for name in base.torch_module().state_dict()), "a head that nobody asks"


@pytest.mark.parametrize(
    ("pooling", "modules", "declared", "expected"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, ("Normalize",), "auto", "unit mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, (), "auto", "cls"),
        ({"pooling_mode": "cls", "include_prompt": True}, ("Normalize",), "auto", "unit cls"),
        ({"pooling_mode": "mean"}, (), "cls", "cls"),
        ({"pooling_mode": "lasttoken"}, (), "mean", "mean"),
    ],
)
def test_the_checkpoint_says_how_it_is_pooled(
    encoder: Path, pooling: dict[str, Any], modules: tuple[str, ...], declared: str, expected: str
) -> None:
    write_pooling(encoder, "Transformer", "Pooling", *modules, **pooling)
    base = opened(encoder, pooling=declared)
    inputs = tokens(base)
    hidden = of_library("BertModel", encoder, inputs).last_hidden_state.numpy()
    weights = inputs[1][:, :, None]
    pooled = hidden[:, 0] if expected.endswith("cls") else (hidden * weights).sum(1) / weights.sum(1)
    if expected.startswith("unit"):
        pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(answers(base), pooled, atol=1e-6)


def test_weights_in_several_files_and_a_model_in_a_folder_of_its_own(checkpoints: Path, tmp_path: Path) -> None:
    write_encoder(tmp_path / "sharded" / "0_Transformer").save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    inner = tmp_path / "sharded" / "0_Transformer"
    (inner / "model.safetensors").unlink()
    for path in (tmp_path / "shards").iterdir():
        shutil.copy(path, inner)
    write_pooling(tmp_path / "sharded", "Transformer", "Pooling", "Normalize", pooling_mode="mean")
    modules = json.loads((tmp_path / "sharded" / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (tmp_path / "sharded" / "modules.json").write_text(json.dumps(modules))
    assert len(list(inner.glob("model-*.safetensors"))) > 1
    np.testing.assert_allclose(
        answers(opened(tmp_path / "sharded")), answers(opened(checkpoints / "encoder")), atol=1e-6
    )
    before = source(tmp_path / "sharded").fingerprint()
    shard = sorted(inner.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    assert source(tmp_path / "sharded").fingerprint() != before


def test_a_name_on_the_hub_is_found_in_its_cache(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "models--someone--tiny.encoder"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    shutil.copytree(checkpoints / "encoder", root / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    base = opened(tmp_path, transformers="someone/tiny.encoder")
    assert base.name == "tiny.encoder"
    np.testing.assert_allclose(answers(base), answers(opened(checkpoints / "encoder")), atol=1e-6)
    with pytest.raises(ConfigError, match=r"base.transformers: the model of 'someone/else' is not in the local cache"):
        opened(tmp_path, transformers="someone/else")


def test_the_length_is_the_least_that_anyone_names(encoder: Path) -> None:
    assert source(encoder).describe().max_length == SHAPE["max_position_embeddings"]
    (encoder / "tokenizer_config.json").write_text('{"model_max_length": 30}')
    assert source(encoder).describe().max_length == 30
    (encoder / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    described = source(encoder).describe()
    assert described.text is not None
    assert (described.max_length, described.text.max_length) == (20, 20)
    other = write_tokenizer(encoder.parent / "other")
    described = source(encoder, text={"tokenizer": "other", "max_length": 12}).describe()
    assert described.text is not None
    assert (described.text.tokenizer, described.text.max_length) == (other, 12)
    assert source(encoder, text={"tokenizer": "other", "max_length": 99}).describe().max_length == 20


def test_positions_that_are_kept_for_padding_are_not_counted(tmp_path: Path) -> None:
    make_torchvision_importable()
    from transformers import RobertaConfig, RobertaModel

    RobertaModel(RobertaConfig(**SHAPE, pad_token_id=1)).save_pretrained(tmp_path / "roberta")
    write_tokenizer(tmp_path / "roberta")
    base = opened(tmp_path / "roberta")
    assert isinstance(base.codec, TextCodec)
    assert base.codec.max_length == 38
    assert base.spec.inputs[0].pad == 1
    longest = base.codec.arrays(base.codec.tokens([" ".join(WORDS * 3), "a cat"]))
    assert longest[0].shape == (2, 38)
    with torch.inference_mode():
        assert base.torch_module()(*map(torch.from_numpy, longest)).isfinite().all()


def test_labels_come_from_the_config_first(checkpoints: Path, tmp_path: Path) -> None:
    assert opened(checkpoints / "classifier", labels=["1", "2", "3"]).spec.labels == ("1", "2", "3")
    write_classifier(tmp_path / "unnamed")
    assert opened(tmp_path / "unnamed").spec.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    write_classifier(tmp_path / "twice", ("crane", "cat", "crane"))
    assert opened(tmp_path / "twice").spec.labels == ("crane", "cat", "crane (2)")
    with pytest.raises(ConfigError, match=r"base.labels: 2 labels for a model with 3 classes"):
        opened(checkpoints / "classifier", labels=["1", "2"])


@pytest.mark.parametrize("rows", ["one_length", "one"])
def test_texts_that_must_not_be_padded_come_one_by_one(checkpoints: Path, rows: str) -> None:
    data = {"texts": "texts.csv", "text": 0, "splits": {"calibration": 4, "gate": 8}}
    padded = opened(checkpoints / "encoder", data)
    assert {len(batch.inputs[0]) for batch in padded.data("gate").batches(4)} == {4}
    apart = opened(checkpoints / "encoder", data, rows=rows)
    batches = [batch.inputs for batch in apart.data("gate").batches(4)]
    assert [len(ids) for ids, _ in batches] == [1] * 8 == [1] * len(apart.data("gate"))
    assert all(mask.all() for _, mask in batches)
    assert apart.caveats[-1] in {"only rows of equal length share a batch", "every row has a batch to itself"}
    assert apart.digest != padded.digest, "it answers another function of a request"


def test_a_default_prompt_is_told(encoder: Path) -> None:
    said = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"}
    (encoder / "config_sentence_transformers.json").write_text(json.dumps(said))
    assert opened(encoder).caveats[0] == "texts are not preceded by the checkpoint's prompt 'query: '"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_fingerprint_follows_every_file_that_decides_answers(checkpoints: Path, encoder: Path) -> None:
    found = [source(checkpoints / "encoder").fingerprint()]
    assert source(encoder).fingerprint() == found[0], "the folder does not matter"
    change(encoder / "config.json", layer_norm_eps=1e-5)
    found.append(source(encoder).fingerprint())
    weights = (encoder / "model.safetensors").read_bytes()
    (encoder / "model.safetensors").write_bytes(weights[:-1] + b"\x01")
    found.append(source(encoder).fingerprint())
    (encoder / "tokenizer.json").write_text((encoder / "tokenizer.json").read_text() + " ")
    found.append(source(encoder).fingerprint())
    for pooling in ("mean", "cls"):
        write_pooling(encoder, "Transformer", "Pooling", pooling_mode=pooling)
        found.append(source(encoder).fingerprint())
    write_tokenizer(encoder.parent / "other")
    found.append(source(encoder, text={"tokenizer": "other"}).fingerprint())
    found += [source(encoder, pooling=pooling).fingerprint() for pooling in ("mean", "cls")]
    found.append(source(encoder, task="embedding").fingerprint())
    assert len(set(found)) == len(found)


def test_opening_again_imports_neither_torch_nor_transformers(checkpoints: Path, tmp_path: Path) -> None:
    data = {"texts": "texts.csv"}
    base = opened(checkpoints / "classifier", data, cache=tmp_path)
    program = (
        "import sys; from leanserve.bases.opening import reopen_base; base = reopen_base(sys.argv[1]);"
        "base.codec.decode('text/plain', b'the cat'); base.data('gate');"
        "print(base.digest, *{'torch', 'transformers', 'onnx', 'sklearn', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, base.origin], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == base.digest


def test_what_cannot_be_served_is_refused_with_the_remedy(encoder: Path, checkpoints: Path) -> None:
    with pytest.raises(ConfigError, match=r"base.task: as a model for text classification, .* lacks .* classifier"):
        source(encoder, task="classification").describe()
    with pytest.raises(ConfigError, match=r"base.inputs: a model of transformers takes texts or images"):
        source(encoder, inputs={"x": {"shape": [3]}}).describe()
    with pytest.raises(ConfigError, match=r"base.transformers: there is no folder .*/no-such/folder/here"):
        source(encoder, transformers="no-such/folder/here").fingerprint()
    with pytest.raises(ConfigError, match=r"base.transformers: there is no config.json in"):
        source(encoder.parent).fingerprint()
    (encoder / "tokenizer.json").unlink()
    with pytest.raises(
        ConfigError, match=r"base.text.tokenizer: there is no .*tokenizer.json. Name a tokenizer.json, or"
    ):
        source(encoder).describe()
    (encoder / "model.safetensors").rename(encoder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no model.safetensors in .*; pytorch_model.bin is a pickle.*save it again"):
        source(encoder).fingerprint()


@pytest.mark.parametrize(
    ("kinds", "pooling", "error"),
    [
        (("Transformer", "Pooling", "Dense"), {"pooling_mode": "mean"}, r"modules.json of .* Dense, .*base.python"),
        (
            ("Transformer", "Pooling"),
            {"pooling_mode": "lasttoken"},
            r"base.pooling: .* pools by lasttoken, .*mean or cls",
        ),
        (("Transformer", "Pooling"), {"pooling_mode": ["mean", "cls"]}, r"base.pooling: .* pools by mean and cls"),
        (("Transformer", "Pooling"), {"pooling_mode_max_tokens": True, "pooling_mode_cls_token": False}, "max_tokens"),
    ],
)
def test_modules_that_are_not_known_are_refused(
    encoder: Path, kinds: tuple[str, ...], pooling: dict[str, Any], error: str
) -> None:
    write_pooling(encoder, *kinds, **pooling)
    with pytest.raises(ConfigError, match=error):
        source(encoder).describe()


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"quantization_config": {"bits": 4}}, r"is quantized already; bring the float checkpoint"),
        ({"num_hidden_layers": 3}, r"base.task: .* lacks trained weights for .*layer.2"),
        ({"hidden_size": 64}, r"cannot be loaded|lacks trained weights"),
        ({"model_type": "newest"}, r"base.transformers: .* cannot be loaded: .*newest"),
        ({"model_type": "mine", "auto_map": {"AutoModel": "mine.Model", "AutoConfig": "mine.C"}}, r"cannot be loaded"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(encoder: Path, values: dict[str, Any], error: str) -> None:
    (encoder / "mine.py").write_text("raise SystemExit('code of a checkpoint was run')")
    change(encoder / "config.json", **values)
    with pytest.raises(ConfigError, match=error):
        source(encoder).describe()


def test_answers_that_are_not_one_class_of_several_are_refused(tmp_path: Path) -> None:
    write_classifier(tmp_path / "regression", num_labels=1)
    with pytest.raises(
        ConfigError, match=r"base.task: the checkpoint gives 1 value per row for the problem 'regression'"
    ):
        source(tmp_path / "regression").describe()
    write_classifier(tmp_path / "tags", problem_type="multi_label_classification")
    with pytest.raises(ConfigError, match=r"base.task: .* for the problem 'multi_label_classification'"):
        source(tmp_path / "tags").describe()


def test_a_folder_that_moves_is_the_same_base(checkpoints: Path, tmp_path: Path) -> None:
    data = {"texts": "texts.csv", "label": 1}
    for name in ("here", "there"):
        shutil.copytree(checkpoints, tmp_path / name)
    bases = [opened(tmp_path / name / "classifier", data, cache=tmp_path / "cache") for name in ("here", "there")]
    assert bases[0].digest == bases[1].digest
    for name, base in zip(("here", "there"), bases, strict=True):
        assert isinstance(base.codec, TextCodec)
        assert base.codec.tokenizer == tmp_path / name / "classifier" / "tokenizer.json"


def test_a_cache_of_the_hub_that_moves_is_found_again(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("here", "there"):
        root = tmp_path / name / "models--someone--tiny"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("0" * 40)
        shutil.copytree(checkpoints / "encoder", root / "snapshots" / ("0" * 40))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / name))
        codec = opened(tmp_path, transformers="someone/tiny", cache=tmp_path / "cache").codec
        assert isinstance(codec, TextCodec)
        assert codec.tokenizer.is_relative_to(tmp_path / name)
        shutil.rmtree(tmp_path / name)
