"""Models of transformers as plain modules: tensors in by position, one tensor out.

The library takes keywords and gives records of optional tensors; passes, exporters and backends want the tensors of the
spec and nothing else.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import normalize

TINY = 1e-9
"""Least number of tokens by which a sum is divided."""


class TextLogits(nn.Module):
    """Token ids and mask int64 [rows, length] -> logits [rows, classes]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


class PictureLogits(nn.Module):
    """Pictures [rows, channels, height, width] -> logits [rows, classes]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=image).logits
        return logits


class TextEmbedding(nn.Module):
    """Token ids and mask int64 [rows, length] -> embeddings [rows, width].

    `mean` is over the tokens under the mask, `cls` the first token, as in Sentence-BERT (Reimers and Gurevych 2019).
    """

    def __init__(self, model: nn.Module, pooling: Literal["mean", "cls"], length: Literal["unit", "free"]) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.length = length

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        pooled = hidden[:, 0] if self.pooling == "cls" else _mean(hidden, attention_mask)
        return normalize(pooled, dim=1) if self.length == "unit" else pooled


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=TINY)
