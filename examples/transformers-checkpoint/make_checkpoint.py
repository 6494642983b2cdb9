"""Make what the config names, so that the example runs anywhere: a fine-tuned classifier of texts, and labelled texts.

The stand-in is small but real: a BERT of two layers, trained from nothing to tell complaints from praise in sentences
put together from the lists below, with a tokenizer trained on them. Replace the folder `checkpoint` by one written by
`save_pretrained`, and the texts by yours.

    python make_checkpoint.py [FOLDER] [--epochs N]
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from leanserve.bases.sources.python_imports import make_torchvision_importable

THINGS = (
    "the room",
    "this phone",
    "our waiter",
    "the delivery",
    "their support",
    "the engine",
    "that film",
    "my order",
)
PRAISE = (
    "was a joy",
    "works perfectly",
    "arrived early",
    "is worth every cent",
    "could not be better",
    "felt like new",
)
BLAME = ("was a mess", "broke at once", "never arrived", "is a waste of money", "could not be worse", "felt worn out")
FRAMES = ("{}.", "I must say {}!", "To be honest, {}, and I told everybody.", "After two weeks {}.", "{}, as expected.")
LABELS = {0: "complaint", 1: "praise"}
BATCH, LEARNING_RATE = 32, 0.002


def main(folder: Path, epochs: int) -> None:
    """Write checkpoint/ and reviews.csv into the folder."""
    rows = sentences()
    with (folder / "reviews.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("review", "verdict"), *((text, LABELS[label]) for text, label in rows)])
    torch.manual_seed(0)
    checkpoint = folder / "checkpoint"
    network = trained(rows[: len(rows) // 2], tokenizer_of([text for text, _ in rows], checkpoint), epochs)
    network.save_pretrained(checkpoint)


def sentences() -> list[tuple[str, int]]:
    """All sentences with their labels, shuffled."""
    rows = [
        (frame.format(f"{thing} {end}"), label)
        for label, ends in enumerate((BLAME, PRAISE))
        for frame, thing, end in itertools.product(FRAMES, THINGS, ends)
    ]
    random.Random(0).shuffle(rows)
    return rows


def tokenizer_of(texts: list[str], checkpoint: Path) -> Any:
    """A WordPiece tokenizer trained on the texts; its file is what the service reads."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special))
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    checkpoint.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    return tokenizer


def trained(rows: list[tuple[str, int]], tokenizer: Any, epochs: int) -> Any:
    """A classifier trained on these rows, in eval mode."""
    make_torchvision_importable()
    from transformers import BertConfig, BertForSequenceClassification

    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    names = {"id2label": LABELS, "label2id": {name: label for label, name in LABELS.items()}}
    config = BertConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=64, **shape, **names)
    network: Any = BertForSequenceClassification(config)
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    encoded = tokenizer.encode_batch([text for text, _ in rows])
    ids, mask = (torch.tensor([getattr(item, name) for item in encoded]) for name in ("ids", "attention_mask"))
    labels = torch.tensor([label for _, label in rows])
    optimiser = torch.optim.AdamW(network.parameters(), LEARNING_RATE)
    for epoch in range(epochs):
        for chosen in torch.randperm(len(ids)).split(BATCH):
            loss = network(input_ids=ids[chosen], attention_mask=mask[chosen], labels=labels[chosen]).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}")
    return network.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent)
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    main(arguments.folder, arguments.epochs)
