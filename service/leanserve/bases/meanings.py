"""What the outputs of a model mean: as the config says, else by the operator they come from, else by their looks.

A softmax over what is a softmax already turns a sure answer into a doubtful one, and a cosine calls a regressor right
that is 18 % off, so nothing may depend on the place of an output in a list. What is declared is believed. The last
operator is proof as far as the numbers of a trial run agree. Numbers and names alone are a guess, and `leanserve init`
says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

import numpy as np

from leanserve.bases.description import Evidence, Tensor
from leanserve.config.base_section import Meanings
from leanserve.contracts import CLASS_MAPS, CLASSES, Array, Meaning
from leanserve.errors import ConfigError

Declared = Meanings | None
"""Outputs without a name, as those of a torch module, get it from a mapping, in its order."""
LastOperator = Literal["softmax", "log_softmax", "sigmoid"]

SUM_TOLERANCE = 5e-3
"""How far probabilities may sum up beside 1: half precision and 8 bits round."""
ROUNDED_ZERO = 1e-5
"""How far below 0 a probability may be: a forest's trees are added up in single precision."""
CLASS_AXES: Final[Mapping[Meaning, int]] = {"classes_first": 1, "classes_last": -1}
"""Of maps of classes, in a batch."""
LEAST_WIDTH = 16
"""Numbers from which on a list of length 1 looks like an embedding; a quaternion has length 1 too."""
NAMES: Final[Mapping[Meaning, str]] = {
    "independent_probabilities": "probabilities",
    "classes_first": "classes",
    "classes_last": "classes",
}
"""What an output without a name is called, where it is not its meaning."""
STRENGTH: Final[Mapping[Evidence, int]] = {"declared": 2, "operator": 1}
"""Of what is known about two outputs that both might be the classes; the others are guesses."""


class Outputs(NamedTuple):
    """The outputs of a model with their meanings, and which of them the labels name."""

    tensors: tuple[Tensor, ...]
    labelled: int


def guessed(tensor: Tensor, samples: Sequence[Array]) -> Tensor:
    """The output with the meaning that its values on random rows, else its name, suggest, if they do."""
    if not _is_list(tensor):
        return _guessed_map(tensor, samples)
    rows = np.concatenate([np.asarray(sample, np.float64) for sample in samples])
    if tensor.shape[0] != 1 and (meaning := _by_numbers(rows)) is not None:
        return _meaning(tensor, meaning, "numbers")
    name = tensor.name.casefold()
    if "embed" in name:
        return _meaning(tensor, "embedding", "name")
    return _meaning(tensor, "logits", "name") if "logit" in name else tensor


def _guessed_map(tensor: Tensor, samples: Sequence[Array]) -> Tensor:
    """An output with several axes as a map of classes, if its numbers or its name suggest it."""
    able = [meaning for meaning in sorted(CLASS_MAPS) if _may_be_map(tensor, meaning)]
    for meaning in able:
        places = [np.moveaxis(np.asarray(sample, np.float64), CLASS_AXES[meaning], -1) for sample in samples]
        rows = np.concatenate([place.reshape(-1, place.shape[-1]) for place in places])
        if _by_numbers(rows) in {"probabilities", "log_probabilities"}:
            return _meaning(tensor, meaning, "numbers")
    if not able or "logit" not in tensor.name.casefold():
        return tensor
    first, last = tensor.shape[0], tensor.shape[-1]
    images = len(tensor.shape) > 2 and first is not None and (last is None or first <= last)
    return _meaning(tensor, "classes_first" if images and "classes_first" in able else able[-1], "name")


def proven(tensor: Tensor, operator: LastOperator | None) -> Tensor:
    """The output, of which the values were looked at, with the meaning that its last operator gives it.

    A softmax counts where rows do sum up to 1: two of them side by side are no distribution any more.
    """
    if operator == "sigmoid" and _is_list(tensor) and tensor.meaning != "probabilities":
        return _meaning(tensor, "independent_probabilities", "operator")
    if tensor.meaning in CLASS_MAPS and operator in {"softmax", "log_softmax"} and tensor.evidence == "numbers":
        return _meaning(tensor, tensor.meaning, "operator")
    if (operator, tensor.meaning) in {("softmax", "probabilities"), ("log_softmax", "log_probabilities")}:
        return _meaning(tensor, tensor.meaning, "operator")
    return tensor


def settled(
    found: Sequence[Tensor], labels: Sequence[str], declared: Declared = None, otherwise: Meaning = "values"
) -> Outputs:
    """The outputs as they will be answered and judged; `otherwise` is the meaning of lists of which nothing is known.

    Raises:
        ConfigError: what is declared does not fit the outputs, or it cannot be told which one the labels name.
    """
    told = _told(found, declared)
    labelled = _labelled(told, labels, tuple(declared) if isinstance(declared, Mapping) else ()) if labels else 0
    last = [_last_word(item, otherwise) for item in told]
    if labels and told[labelled].meaning not in CLASSES:
        last[labelled] = _meaning(told[labelled], "logits", "labels")
    elif labels:
        last[labelled] = told[labelled]
    return Outputs(_named(last, labelled), labelled)


def _by_numbers(rows: Array) -> Meaning | None:
    if not np.isfinite(rows).all():
        return None
    if rows.min() >= -ROUNDED_ZERO and np.allclose(rows.sum(axis=1), 1, rtol=0, atol=SUM_TOLERANCE):
        return "probabilities"
    if rows.max() <= 0 and np.allclose(np.exp(rows).sum(axis=1), 1, rtol=0, atol=SUM_TOLERANCE):
        return "log_probabilities"
    lengths = np.linalg.norm(rows, axis=1)
    return "embedding" if rows.shape[1] >= LEAST_WIDTH and np.allclose(lengths, 1, rtol=0, atol=SUM_TOLERANCE) else None


def _told(found: Sequence[Tensor], declared: Declared) -> list[Tensor]:
    """The outputs with what is declared of them."""
    if declared is None:
        return list(found)
    nameless = not all(item.name for item in found)
    if isinstance(declared, Mapping) and not nameless:
        known = [item.name for item in found]
        if unknown := [name for name in declared if name not in known]:
            raise ConfigError(f"base.outputs: the model has no output '{unknown[0]}'; it gives {_shown(found)}")
        return [_declared(item, declared[item.name]) if item.name in declared else item for item in found]
    if len(declared) != len(found):
        raise ConfigError(f"base.outputs: declares {len(declared)} outputs; the model gives {_shown(found)}")
    if isinstance(declared, Mapping):
        found = [item.model_copy(update={"name": name}) for item, name in zip(found, declared, strict=True)]
        declared = tuple(declared.values())
    return [_declared(*pair) for pair in zip(found, declared, strict=True)]


def _declared(tensor: Tensor, meaning: Meaning) -> Tensor:
    if meaning in CLASS_MAPS and not _may_be_map(tensor, meaning):
        raise ConfigError(
            f"base.outputs: {meaning} have two axes or more in a row, floats, and on the {meaning[8:]} one a fixed "
            f"number of classes, at least 2; {_shown([tensor])} {tensor.dtype} has not"
        )
    if meaning not in {"values", *CLASS_MAPS} and not _is_list(tensor):
        raise ConfigError(
            f"base.outputs: {meaning} are one list of floats per row, and {_shown([tensor])} {tensor.dtype} is not; "
            "declare it as values"
        )
    return _meaning(tensor, meaning, "declared")


def _labelled(told: Sequence[Tensor], labels: Sequence[str], order: Sequence[str]) -> int:
    """The position of the output whose classes the labels name."""
    fitting = [index for index, item in enumerate(told) if _is_list(item) and item.shape == (len(labels),)]
    if not fitting:
        raise ConfigError(
            f"base.labels: {len(labels)} labels, and no output has {len(labels)} numbers per row: the model gives "
            f"{_shown(told)}"
        )
    able = [index for index in fitting if told[index].meaning in CLASSES or told[index].evidence != "declared"]
    if not able:
        raise ConfigError(
            f"base.outputs: {_shown([told[index] for index in fitting])} is declared as {told[fitting[0]].meaning}, "
            "but base.labels names its classes; declare it as logits or probabilities, or leave out the labels"
        )
    classes = [index for index in able if told[index].meaning in CLASSES]
    strongest = max((STRENGTH.get(told[index].evidence, 0) for index in classes), default=0)
    best = [index for index in classes if STRENGTH.get(told[index].evidence, 0) == strongest] or able
    if strongest == STRENGTH["declared"]:
        return min(best, key=lambda index: order.index(told[index].name) if order else index)
    if len(best) > 1:
        raise ConfigError(
            f"base.labels: the labels may name the classes of {_shown([told[index] for index in best], ' or of ')}; "
            f"say which in base.outputs, as in `outputs: {{{told[best[0]].name or 'NAME'}: logits}}`, where the first "
            "output that is declared as classes is the one that answers"
        )
    return best[0]


def _last_word(tensor: Tensor, otherwise: Meaning) -> Tensor:
    """What an output means that the labels do not name."""
    if tensor.meaning == "independent_probabilities" and tensor.evidence == "operator":
        return _meaning(tensor, "values", "none")  # numbers from 0 to 1 may be classes, or coordinates
    if tensor.evidence == "none" and _is_list(tensor) and otherwise != "values":
        return _meaning(tensor, otherwise, "form")
    return tensor


def _named(tensors: Sequence[Tensor], labelled: int) -> tuple[Tensor, ...]:
    """Outputs without a name are called after their meaning where one name is enough, else by their number."""
    named: list[Tensor] = []
    for index, item in enumerate(tensors):
        plain = NAMES.get(item.meaning, item.meaning)
        first = "output" if plain == "values" else plain
        name = first if index == 0 or (index == labelled and plain in CLASSES) else f"output_{index}"
        name = f"output_{index}" if any(other.name == name for other in named) else name
        named.append(item if item.name else item.model_copy(update={"name": name}))
    return tuple(named)


def _is_list(tensor: Tensor) -> bool:
    """Whether a row has one list of floats, of the same length as those of all other rows."""
    return len(tensor.shape) == 1 and tensor.shape[0] is not None and tensor.dtype.startswith("float")


def _may_be_map(tensor: Tensor, meaning: Meaning) -> bool:
    """Whether a row has several axes, and the one of the classes a fixed size."""
    if len(tensor.shape) < 2 or not tensor.dtype.startswith("float"):
        return False
    return (tensor.shape[0 if meaning == "classes_first" else -1] or 0) > 1


def _meaning(tensor: Tensor, meaning: Meaning, evidence: Evidence) -> Tensor:
    return tensor.model_copy(update={"meaning": meaning, "evidence": evidence})


def _shown(tensors: Sequence[Tensor], join: str = ", ") -> str:
    return join.join(f"{repr(item.name) if item.name else 'an output'} {list(item.shape)}" for item in tensors)
