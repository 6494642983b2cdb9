"""A transformer block over token ids with a mask: what quantizing passes meet in language models, in miniature."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from leanserve.contracts import ModelSpec, TensorSpec
from tiny_base import TinyBase, lively

TOKENS = ModelSpec(
    (TensorSpec("ids", "int64", (None,)), TensorSpec("mask", "int64", (None,))),
    (TensorSpec("embedding", "float32", (16,)),),
)
VOCABULARY = 50


class TinyEncoder(nn.Module):
    """Embedding, one block of attention and feed-forward, masked mean, projection."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm_attention, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 16)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        visible = mask[:, None, :].bool()
        query, key, value = (layer(x).unsqueeze(1) for layer in (self.query, self.key, self.value))
        attended = nn.functional.scaled_dot_product_attention(query, key, value, visible[:, None])
        x = self.norm_attention(x + self.out(attended.squeeze(1)))
        x = self.norm(x + self.down(nn.functional.gelu(self.up(x))))
        weight = mask[..., None].to(x.dtype)
        embedding: torch.Tensor = self.head((x * weight).sum(1) / weight.sum(1))
        return embedding


def tiny_encoder_base(rows: int = 24, length: int = 12) -> TinyBase:
    """A base of random sentences, the last third of each masked out in every other row."""
    random = np.random.default_rng(0)
    ids = random.integers(0, VOCABULARY, (rows, length))
    mask = np.ones_like(ids)
    mask[::2, 2 * length // 3 :] = 0
    return TinyBase(lively(TinyEncoder(), seed=1), (ids, mask), None, TOKENS)
