"""Decoders, encoder-decoders and models saved for other tasks: the library's answers for each text alone, or refusals.

The tokenizer's [SEP], number 3, is the end token; [PAD], number 0, is for padding where a model has one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leanserve.bases.loaded import LoadedBase
from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.codecs.text import TextCodec
from leanserve.contracts import Array, Model, Share
from leanserve.errors import ConfigError
from leanserve.passes.families.runtime.onnxruntime import OnnxRuntime
from leanserve.runtime.formats import open_backend
from tiny_base import context_of
from tiny_checkpoints import SHAPE, write_model, write_tokenizer

TEXTS = ["the cat sat on the mat", "a dog", "a very big green tree and a red film was not good"]
BERT: dict[str, Any] = {name: SHAPE[name] for name in SHAPE if name != "vocab_size"}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 24, "initializer_range": 0.2}
GPT2 |= {"bos_token_id": None, "eos_token_id": 3}
QWEN2: dict[str, Any] = BERT | {
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 3,
}
BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "max_position_embeddings": 24,
    "init_std": 0.2,
}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
BART |= {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 3, "forced_eos_token_id": None}
BART |= {"bos_token_id": 2}
T5: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "initializer_factor": 4.0}
T5 |= {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
NO_ENDS = "$A"


def opened(folder: Path, **declared: Any) -> LoadedBase:
    base = {"transformers": folder.name} | declared
    return open_base(Origin.model_validate({"base": base, "data": {"synthetic": 8}, "folder": folder.parent}))


def answers(base: LoadedBase, model: Model) -> Array:
    """Of all texts in one batch."""
    assert isinstance(base.codec, TextCodec)
    backend = open_backend(model, Share(1))
    try:
        return backend.run(base.codec.arrays(base.codec.tokens(TEXTS))).outputs[0]
    finally:
        backend.close()


def alone(base: LoadedBase, model: Any) -> Any:
    """What the library answers for each text without padding."""
    assert isinstance(base.codec, TextCodec)
    with torch.inference_mode():
        return [model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))) for ids in base.codec.tokens(TEXTS)]


CLASSIFIERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2 without padding": ("GPT2ForSequenceClassification", NO_ENDS, GPT2),
    "gpt2 that pads with its end": ("GPT2ForSequenceClassification", NO_ENDS, GPT2 | {"pad_token_id": 3}),
    "gpt2 behind its end": ("GPT2ForSequenceClassification", "$A [SEP]", GPT2),
    "qwen2 without padding": ("Qwen2ForSequenceClassification", NO_ENDS, QWEN2),
    "qwen2 with padding": ("Qwen2ForSequenceClassification", NO_ENDS, QWEN2 | {"pad_token_id": 0}),
    "bart": ("BartForSequenceClassification", "[CLS] $A [SEP]", BART),
    "mbart": ("MBartForSequenceClassification", "$A [SEP] [CLS]", BART),
    "t5": ("T5ForSequenceClassification", "$A [SEP]", T5),
}


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_classes_are_those_of_the_library_for_each_text_alone(case: str, tmp_path: Path) -> None:
    kind, template, config = CLASSIFIERS[case]
    library = write_model(tmp_path / "model", kind, config | {"num_labels": 3}, template)
    base = opened(tmp_path / "model")
    expected = np.concatenate([item.logits.numpy() for item in alone(base, library)])
    assert np.ptp(expected, axis=0).min() > 1e-3, "texts must differ for the comparison to mean anything"
    np.testing.assert_allclose(answers(base, base.model()), expected, atol=1e-5)


@pytest.mark.soak
def test_decoders_and_ends_of_texts_are_exported(tmp_path: Path) -> None:
    for kind, config in (("GPT2ForSequenceClassification", GPT2), ("BartForSequenceClassification", BART)):
        write_model(tmp_path / kind, kind, config | {"num_labels": 3})
        base = opened(tmp_path / kind)
        context = context_of(base, tmp_path)
        exported = OnnxRuntime().apply(base.model(), context).model
        np.testing.assert_allclose(answers(base, exported), answers(base, base.model()), atol=1e-5)


EMBEDDERS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "gpt2": ("GPT2Model", GPT2, {}),
    "qwen2": ("Qwen2Model", QWEN2, {}),
    "t5 encoder": ("T5EncoderModel", T5, {}),
    "whole t5": ("T5ForConditionalGeneration", T5, {"task": "embedding"}),
    "bart": ("BartModel", BART, {}),
    "bert for tokens": ("BertForTokenClassification", BERT, {"task": "embedding"}),
    "bert for masked words": ("BertForMaskedLM", BERT, {"task": "embedding"}),
}


@pytest.mark.parametrize("case", EMBEDDERS)
def test_embeddings_are_means_over_the_tokens_of_each_text_alone(case: str, tmp_path: Path) -> None:
    kind, config, declared = EMBEDDERS[case]
    library = write_model(tmp_path / "model", kind, config)
    base = opened(tmp_path / "model", **declared)
    inner = getattr(library, "bert", library)
    encoder = inner.get_encoder() if library.config.is_encoder_decoder else inner
    means = np.concatenate([item.last_hidden_state.mean(1).numpy() for item in alone(base, encoder)])
    expected = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(answers(base, base.model()), expected, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "config", "gives"),
    [
        ("BertForTokenClassification", BERT, "a class per token"),
        ("BertForQuestionAnswering", BERT, "the spans of answers"),
        ("BertForMaskedLM", BERT, "words for masked places"),
        ("BertForMultipleChoice", BERT, "a choice among several texts"),
        ("BertForNextSentencePrediction", BERT, "whether a text follows another"),
        ("GPT2LMHeadModel", GPT2, "the next word"),
        ("Qwen2ForCausalLM", QWEN2, "the next word"),
        ("T5ForConditionalGeneration", T5, "generated text"),
    ],
)
def test_models_for_other_tasks_are_refused_with_the_remedy(
    kind: str, config: dict[str, Any], gives: str, tmp_path: Path
) -> None:
    write_model(tmp_path / "model", kind, config)
    with pytest.raises(
        ConfigError, match=rf"base.task: .* was saved as {kind}, which gives {gives}; .*`task: embedding`.*base.python"
    ):
        opened(tmp_path / "model")
    with pytest.raises(ConfigError, match=rf"as a model for text classification, .* lacks .* saved as {kind}"):
        opened(tmp_path / "model", task="classification")


def test_a_model_of_images_is_no_encoder_of_texts(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"image_size": 32, "patch_size": 8}
    write_model(tmp_path / "vit", "ViTModel", sizes)
    with pytest.raises(ConfigError, match=r"base.transformers: .*vit takes pixel_values; served are .*base.python"):
        opened(tmp_path / "vit")
    write_model(tmp_path / "detector", "ViTForMaskedImageModeling", sizes)
    with pytest.raises(ConfigError, match=r"as ViTForMaskedImageModeling; served are [^`]*$"):
        opened(tmp_path / "detector")


def test_texts_without_the_end_that_the_model_answers_at_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "bart", "BartForSequenceClassification", BART, NO_ENDS)
    with pytest.raises(
        ConfigError, match=r"base.text.tokenizer: .* at the end token \(3\), which .*TemplateProcessing"
    ):
        opened(tmp_path / "bart")
    write_tokenizer(tmp_path / "other")
    assert opened(tmp_path / "bart", text={"tokenizer": "other"}).spec.outputs[0].name == "logits"


def test_the_positions_of_a_decoder_bound_its_texts(tmp_path: Path) -> None:
    write_model(tmp_path / "gpt2", "GPT2Model", GPT2)
    assert opened(tmp_path / "gpt2").spec.max_length == GPT2["n_positions"]


def test_a_classifier_without_its_pooler_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    write_model(tmp_path / "bert", "BertForSequenceClassification", BERT)
    path = tmp_path / "bert" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if "pooler" not in name}
    save_file(kept, path, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"base.task: .* lacks trained weights for bert.pooler"):
        opened(tmp_path / "bert")
