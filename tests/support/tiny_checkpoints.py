"""Checkpoints of transformers in miniature, written as users have them: random weights, a tokenizer of a few words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from leanserve.bases.sources.python_imports import make_torchvision_importable

WORDS = (
    *("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "green", "red", "big", "small"),
    *("is", "was", "and", "very", "not", "good", "bad", "film", "song"),
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SHAPE = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,  # the usual 0.02 gives all texts nearly the same embedding
}


def write_tokenizer(folder: Path, template: str = "[CLS] $A [SEP]") -> Path:
    """A tokenizer.json that knows `WORDS` and puts [CLS] and [SEP] around a text, or what the template says."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write_encoder(folder: Path, **config: Any) -> Any:
    """A BertModel with its tokenizer; returns the library's model."""
    make_torchvision_importable()
    from transformers import BertConfig, BertModel

    return _saved(BertModel, BertConfig(**SHAPE | config), folder)


def write_classifier(folder: Path, labels: tuple[str, ...] = (), **config: Any) -> Any:
    """A BertForSequenceClassification of three classes with its tokenizer; returns the library's model."""
    make_torchvision_importable()
    from transformers import BertConfig, BertForSequenceClassification

    named = {"id2label": dict(enumerate(labels))} if labels else {"num_labels": 3}
    return _saved(BertForSequenceClassification, BertConfig(**SHAPE | named | config), folder)


def write_model(folder: Path, kind: str, config: Mapping[str, Any], template: str = "[CLS] $A [SEP]") -> Any:
    """Any model of the library, by its class and the config's own names; returns it."""
    make_torchvision_importable()
    import transformers

    model_class = getattr(transformers, kind)
    return _saved(model_class, model_class.config_class(vocab_size=SHAPE["vocab_size"], **config), folder, template)


def _saved(kind: Any, config: Any, folder: Path, template: str = "[CLS] $A [SEP]") -> Any:
    torch.manual_seed(0)
    model = kind(config).eval()
    model.save_pretrained(folder)
    write_tokenizer(folder, template)
    return model


def write_pooling(folder: Path, *kinds: str, **pooling: Any) -> None:
    """The files by which sentence-transformers tells how token vectors become an embedding."""
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": "" if kind == "Transformer" else f"{number}_{kind}",
            "type": f"st.{kind}",
        }
        for number, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
