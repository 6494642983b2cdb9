"""Networks that hold one tensor under several names: a language model in miniature, and what breaks formats by name."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from leanserve.contracts import ModelSpec, TensorSpec
from tiny_base import TinyBase, lively
from tiny_encoder import TOKENS, VOCABULARY

LANGUAGE = ModelSpec(TOKENS.inputs, (TensorSpec("logits", "float32", (VOCABULARY,)),))


class TiedLanguage(nn.Module):
    """Table and output layer share a weight, one layer stands under two names, and one of them is called twice."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.mix = nn.Linear(width, width)
        self.again = self.mix
        self.last = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.tokens(ids)
        x = x + torch.relu(self.mix(x))
        x = x + torch.relu(self.again(torch.relu(self.again(x))))
        weight = mask[..., None].to(x.dtype)
        pooled = (x * weight).sum(1) / weight.sum(1)
        logits: Tensor = self.head(torch.relu(self.norm(self.last(pooled))))
        return logits


def tied_base(rows: int = 24, length: int = 12) -> TinyBase:
    random = np.random.default_rng(0)
    ids = random.integers(0, VOCABULARY, (rows, length))
    return TinyBase(
        lively(TiedLanguage(), seed=1), (ids, np.ones_like(ids)), random.integers(0, VOCABULARY, rows), LANGUAGE
    )
