"""Transformers in miniature with a stack of layers: attention in three linear layers or in one, layers that give a
tuple, as in the libraries that people bring models from."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanserve.contracts import ModelSpec, TensorSpec
from tiny_base import TinyBase, lively

LENGTH, WIDTH, HEADS = 6, 32, 4


class Apart(nn.Module):
    """Query, key and value by themselves, as in transformers' BERT: the layer that reads them stands outside."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = HEADS, WIDTH // HEADS, WIDTH
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        rows = [
            layer(x).view(*x.shape[:-1], self.num_attention_heads, self.attention_head_size).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        mixed = F.scaled_dot_product_attention(*rows).transpose(1, 2)
        return mixed.reshape(*x.shape[:-1], self.all_head_size)


class Fused(nn.Module):
    """All three in one linear layer, as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = HEADS, WIDTH // HEADS, WIDTH
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        parts = self.qkv(x).reshape(rows, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(rows, length, self.attn_dim)


class StackLayer(nn.Module):
    """Pre-norm attention and feed-forward; `tuple_` gives its answer as libraries do."""

    def __init__(self, attention: nn.Module, *, tuple_: bool) -> None:
        super().__init__()
        self.attention, self.out = attention, nn.Linear(WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.tuple_ = tuple_

    def forward(self, x: Tensor, scale: float = 1.0) -> Any:
        x = x + scale * self.out(self.attention(self.norm1(x)))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return (x, None) if self.tuple_ else x


class Stacked(nn.Module):
    """Layers over rows of tokens, and a classifier of their mean."""

    def __init__(self, attention: type[nn.Module] = Apart, layers: int = 4, *, tuple_: bool = False) -> None:
        super().__init__()
        self.enter = nn.Linear(8, WIDTH)
        self.layers = nn.ModuleList(StackLayer(attention(), tuple_=tuple_) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.enter(tokens)
        for layer in self.layers:
            given = layer(x, scale=1.0)
            x = given[0] if isinstance(given, tuple) else given
        logits: Tensor = self.head(x.mean(1))
        return logits


def stacked_base(module: nn.Module | None = None, rows: int = 40) -> TinyBase:
    """A base around `module`, whose second layer changes little and whose first head of every layer adds nothing."""
    random = np.random.default_rng(0)
    tokens = random.standard_normal((rows, LENGTH, 8)).astype(np.float32)
    spec = ModelSpec(
        (TensorSpec("tokens", "float32", (LENGTH, 8)),), (TensorSpec("logits", "float32", (10,), meaning="logits"),)
    )
    module = lively(copy.deepcopy(module or Stacked()), seed=1)
    size = WIDTH // HEADS
    with torch.no_grad():
        for layer in module.get_submodule("layers").children():
            layer.get_parameter("out.weight")[:, :size] *= 1e-3
            layer.get_parameter("down.weight")[:, ::2] *= 1e-3
        for name in ("out", "down"):
            for leaf in ("weight", "bias"):
                module.get_parameter(f"layers.1.{name}.{leaf}").mul_(1e-2)
    return TinyBase(module, (tokens,), random.integers(0, 10, rows), spec)
