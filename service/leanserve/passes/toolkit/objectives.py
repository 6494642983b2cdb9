"""How far a student's answers are from its teacher's while it trains: one function per meaning of an output.

The counterpart of `compression.fidelity` that has gradients. What is compared is what the answers are made of:
probabilities are not put through a softmax once more, and values are measured by what they vary in the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from leanserve.contracts import Meaning

LossKind = Literal["kl", "mse", "cosine"]

BY_MEANING: Final[Mapping[Meaning, LossKind]] = {
    "logits": "kl",
    "probabilities": "kl",
    "log_probabilities": "kl",
    "independent_probabilities": "kl",
    "embedding": "cosine",
    "classes_first": "mse",
    "classes_last": "mse",
    "values": "mse",
}
"""What suits an output best."""
RULED_OUT = -1e4
"""A logarithm whose exponential is 0."""
LEAST = 1e-7
"""Probability in place of 0, near what float32 can tell from it beside 1."""


class Output(NamedTuple):
    """One output of the teacher: its meaning, and what the errors of its channels are relative to (broadcast)."""

    meaning: Meaning
    scales: Tensor
    temperature: float


def kl(given: Tensor, wanted: Tensor, output: Output) -> Tensor:
    """Divergence from the teacher's probabilities (nats), both softened; mean over rows.

    Gradients shrink with the temperature's square, which is undone (Hinton et al. 2015, section 2.1).
    """
    if output.meaning == "independent_probabilities":
        ours, theirs = (_odds(item) / output.temperature for item in (given, wanted))
        present = _divergence(F.logsigmoid(ours), F.logsigmoid(theirs))
        absent = _divergence(F.logsigmoid(-ours), F.logsigmoid(-theirs))
        return (present + absent) * output.temperature**2
    ours, theirs = (F.log_softmax(logits(item, output.meaning) / output.temperature, -1) for item in (given, wanted))
    return _divergence(ours, theirs) * output.temperature**2


def cosine(given: Tensor, wanted: Tensor, _: Output) -> Tensor:
    """1 - cosine similarity, mean over rows."""
    given, wanted = _without_infinities(given, wanted)
    return (1 - F.cosine_similarity(given, wanted, dim=-1)).mean()


def mse(given: Tensor, wanted: Tensor, output: Output) -> Tensor:
    """Mean square error of the channels, each relative to the square of its scale."""
    given, wanted = _without_infinities(given, wanted)
    return ((given - wanted) / output.scales).square().mean()


MEASURES: Final[Mapping[LossKind, Callable[[Tensor, Tensor, Output], Tensor]]] = {
    "kl": kl,
    "mse": mse,
    "cosine": cosine,
}


def logits(output: Tensor, meaning: Meaning) -> Tensor:
    """What a softmax makes the probabilities of, [..., classes]; values are taken for that already."""
    if meaning in {"probabilities", "independent_probabilities"}:
        return output.clamp_min(LEAST).log()
    return output


def cross_entropy(output: Tensor, labels: Tensor, meaning: Meaning) -> Tensor:
    """Of class numbers int [rows], mean over rows (nats); of independent probabilities, the sum over classes."""
    if meaning == "independent_probabilities":
        wanted = F.one_hot(labels.long(), output.shape[-1]).to(output.dtype)
        return F.binary_cross_entropy(output.clamp(LEAST, 1 - LEAST), wanted, reduction="sum") / len(output)
    return F.cross_entropy(logits(output, meaning), labels.long())


def _odds(probabilities: Tensor) -> Tensor:
    return probabilities.clamp(LEAST, 1 - LEAST).logit()


def _without_infinities(given: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """With 0 where both are the same infinity, whose difference is NaN."""
    alike = wanted.isinf() & (given == wanted)
    return given.masked_fill(alike, 0.0), wanted.masked_fill(alike, 0.0)


def _divergence(ours: Tensor, theirs: Tensor) -> Tensor:
    # A class that the teacher rules out (a logarithm of -inf) adds p log p = 0, which floats call NaN.
    out = theirs.isneginf()
    ours, theirs = ours.masked_fill(out, 0.0), theirs.masked_fill(out, RULED_OUT)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
