"""A BERT encoder that gives one embedding per text: the architecture behind the text bases.

Post-norm transformer layers (Devlin et al., "BERT", NAACL 2019) and, inside the model, what turns token states into an
embedding: the mean over the tokens that the mask shows, then length 1 (Reimers and Gurevych, "Sentence-BERT", EMNLP
2019). So the server moves 384 numbers per text instead of 384 per token, and a variant is judged by what clients get.

Written out in plain linear layers, so that passes see and split each of them, and exports without a fixed length.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RENAMED = (
    ("embeddings.word_embeddings.", "words."),
    ("embeddings.position_embeddings.", "positions."),
    ("embeddings.token_type_embeddings.", "types."),
    ("embeddings.LayerNorm.", "norm."),
    ("encoder.layer.", "layers."),
    (".attention.self.", ".attention."),
    (".attention.output.dense.", ".attention.out."),
    (".attention.output.LayerNorm.", ".attention_norm."),
    (".intermediate.dense.", ".up."),
    (".output.dense.", ".down."),
    (".output.LayerNorm.", ".norm."),
)
"""Names in checkpoints of transformers -> names here; the first half of a name that fits is replaced, in this order."""
EMPTY = 1e-6
"""Length below which a row is left as it is: only that of a row without any token, and not zero in float16 either."""
UNUSED = ("pooler.", "embeddings.position_ids")
"""What such checkpoints hold besides: a head for next-sentence prediction, and a constant."""


class Attention(nn.Module):
    """Every token looks at the visible ones: [N, L, width] -> [N, L, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`mask` [N, 1, 1, L] is added to the scores."""
        inward = (self.query, self.key, self.value)
        query, key, value = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in inward)
        attended = F.scaled_dot_product_attention(query, key, value, mask)
        mixed: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return mixed


class Layer(nn.Module):
    """Attention, then two linear layers on each token alone; each is added to its input and normalised."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention(x, mask))
        changed: Tensor = self.norm(x + self.down(F.gelu(self.up(x))))
        return changed


class SentenceBert(nn.Module):
    """Token ids and mask (1 = token, 0 = padding), int64 [N, L] each -> embeddings [N, width] of length 1.

    Padding changes nothing; a row without any token gives zeros. `longest` is the largest L.
    """

    def __init__(self, vocabulary: int, longest: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(longest, width)
        self.types = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        # Of the two segments that BERT tells apart, a text alone is the first.
        x = self.norm(self.words(input_ids) + self.positions(places) + self.types.weight[0])
        visible = attention_mask.to(x.dtype)
        # Finite, or a row without any token would be NaN.
        hidden = (1 - visible[:, None, None, :]) * torch.finfo(x.dtype).min
        for layer in self.layers:
            x = layer(x, hidden)
        total = (x * visible[:, :, None]).sum(1)
        # The mean's denominator would not survive the normalisation, so there is none.
        return F.normalize(total, dim=1, eps=EMPTY)


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a `BertModel` of transformers with the names of `SentenceBert`."""
    return {_renamed(name): tensor for name, tensor in state.items() if not name.startswith(UNUSED)}


def _renamed(name: str) -> str:
    for theirs, ours in RENAMED:
        name = name.replace(theirs, ours)
    return name
