"""Models of transformers as plain modules: tensors in by position, one tensor out.

The library takes keywords and gives records of optional tensors; passes, exporters and backends want the tensors of the
spec and nothing else.
"""

from __future__ import annotations

from typing import Literal

import torch
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


class LastTokenLogits(nn.Module):
    """As `TextLogits`, from the vector of each text's last token: for decoders that know no token for padding.

    The library answers for such a model only text by text; where there is no padding, its last token is the last one.
    """

    def __init__(self, model: nn.Module, prefix: str) -> None:
        super().__init__()
        self.model = model
        self.prefix = prefix

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        decoder = self.model.get_submodule(self.prefix)
        hidden: Tensor = decoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits: Tensor = self.model.get_submodule("score")(_last(hidden, attention_mask))
        return logits


class EndTokenLogits(nn.Module):
    """As `TextLogits`, from the decoder's vector of each text's last end token (BART, T5): texts must have one.

    The library picks these vectors by a mask, which neither batches with rows of random ids nor exporters take.
    """

    def __init__(self, model: nn.Module, prefix: str, end: int) -> None:
        super().__init__()
        self.model = model
        self.prefix = prefix
        self.end = end

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        shift = getattr(self.model, "_shift_right", None)  # BART's inner model shifts by itself, T5's does not
        decoded = {} if shift is None else {"decoder_input_ids": shift(input_ids)}
        inner = self.model.get_submodule(self.prefix)
        hidden: Tensor = inner(input_ids=input_ids, attention_mask=attention_mask, **decoded).last_hidden_state
        head = self.model.get_submodule("classification_head")
        logits: Tensor = head(_last(hidden, (input_ids == self.end).to(input_ids.dtype)))
        return logits


class ImageLogits(nn.Module):
    """Images [rows, channels, height, width] -> logits [rows, classes]."""

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


def _last(hidden: Tensor, marked: Tensor) -> Tensor:
    """Of each row the vector at the last marked place."""
    places = torch.arange(marked.shape[1], device=marked.device, dtype=marked.dtype)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), (places * marked).argmax(1)]


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=TINY)
