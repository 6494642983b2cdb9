"""From the config's `score:` to a function of answers and labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np

from leanserve.bases.checkpoints import file_digest
from leanserve.bases.scores.detection import Detections, mean_average_precision
from leanserve.bases.scores.segmentation import mean_intersection_over_union
from leanserve.bases.scores.sequences import in_symbols, spoken, symbol_accuracy
from leanserve.bases.scores.verification import all_pairs, equal_error_rate
from leanserve.bases.sources.python_imports import Imports, make_findable
from leanserve.config.score_section import (
    AnyScore,
    DetectionScore,
    FunctionScore,
    SegmentationScore,
    SequenceScore,
    VerificationScore,
)
from leanserve.contracts import Array, Arrays, ModelSpec
from leanserve.errors import ConfigError, PassFailed
from leanserve.scoring import Scoring

ByName = Mapping[str, Array]
"""Outputs by their names."""


def open_score(declared: AnyScore, spec: ModelSpec, folder: Path) -> Scoring:
    """The score that the config declares, for a model of these outputs; paths are relative to `folder`.

    Raises:
        ConfigError: the model has no such output, a file is missing, or the function cannot be imported.
    """
    known = [item.name for item in spec.outputs]
    name, function, digest = OPENED[type(declared)](declared, spec, folder)
    for key in ("detection", "scores", "classes", "sequence", "segmentation", "verification"):
        asked = getattr(declared, key, None)
        if asked is not None and asked not in known:
            raise ConfigError(f"score.{key}: the model has no output '{asked}'; it gives {', '.join(known)}")

    def score(outputs: Arrays, labels: Array) -> float:
        return function(dict(zip(known, outputs, strict=True)), labels)

    options = f"{declared.model_dump_json()} {' '.join(known)} {digest}"
    return Scoring(name, score, hashlib.sha256(options.encode()).hexdigest())


Opened = tuple[str, Callable[[ByName, Array], float], str]
"""Name of a score, the score, and what decides it besides its options."""


def _function(declared: FunctionScore, _: ModelSpec, folder: Path) -> Opened:
    module, __, function = declared.function.partition(":")
    make_findable(module, folder, "score")
    try:
        found = getattr(import_module(module), function, None)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise ConfigError(f"score: importing {module} failed: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ConfigError(f"score: the module {module} has no function {function}")
    imports = Imports(module)
    files = [f"{name} {file_digest(path)}" for name, path in sorted(imports.files.items())]
    libraries = [f"{library}=={version}" for library, version in imports.libraries.items()]
    return declared.function, partial(_own, declared.function, found), "\n".join((*files, *libraries))


def _own(name: str, function: Callable[[ByName, Array], Any], outputs: ByName, labels: Array) -> float:
    try:
        return float(function(outputs, labels))
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise PassFailed(f"score: {name} failed: {type(error).__name__}: {error}", lasting=False) from error


def _detection(declared: DetectionScore, _: ModelSpec, __: Path) -> Opened:
    def score(outputs: ByName, labels: Array) -> float:
        if labels.ndim != 3 or labels.shape[2] != 5:
            raise PassFailed(
                f"score: labels of detections are [rows, boxes, 5], not {list(labels.shape)}", lasting=False
            )
        classes = None if declared.classes is None else outputs[declared.classes]
        found = Detections.of(outputs[declared.detection], outputs[declared.scores], classes)
        return mean_average_precision(found, labels, declared.overlaps)

    return "mean average precision", score, ""


def _sequence(declared: SequenceScore, _: ModelSpec, folder: Path) -> Opened:
    alphabet = _alphabet(declared.alphabet, folder)
    if declared.symbols != "token" and not alphabet:
        raise ConfigError(f"score.alphabet: to count {declared.symbols}s, say what the ids stand for")

    def score(outputs: ByName, labels: Array) -> float:
        pairs: list[tuple[Sequence[object], Sequence[object]]] = []
        for answer, wanted in zip(outputs[declared.sequence], labels, strict=True):
            ids = spoken(answer, declared.blank)
            if declared.symbols == "token":
                pairs.append((ids, spoken(np.atleast_1d(wanted), None)))
            else:
                text = "".join(alphabet[number] for number in ids if number < len(alphabet))
                pairs.append((in_symbols(text, declared.symbols), in_symbols(str(wanted), declared.symbols)))
        return symbol_accuracy(pairs)

    name = {"character": "1 - CER", "word": "1 - WER", "token": "1 - token error rate"}[declared.symbols]
    return name, score, "\n".join(alphabet)


def _alphabet(declared: str | Path | None, folder: Path) -> list[str]:
    if declared is None:
        return []
    path = folder / declared
    try:
        is_file = path.is_file()
    except OSError:  # too long for a path
        is_file = False
    return path.read_text(encoding="utf-8").splitlines() if is_file else list(str(declared))


def _segmentation(declared: SegmentationScore, _: ModelSpec, __: Path) -> Opened:
    def score(outputs: ByName, labels: Array) -> float:
        return mean_intersection_over_union(outputs[declared.segmentation], labels, declared.ignored)

    return "mean IoU", score, ""


def _verification(declared: VerificationScore, spec: ModelSpec, _: Path) -> Opened:
    meanings = {item.name: item.meaning for item in spec.outputs}

    def score(outputs: ByName, labels: Array) -> float:
        answers = outputs[declared.verification]
        if meanings[declared.verification] == "embedding":
            return 1 - equal_error_rate(*all_pairs(answers, labels))
        return 1 - equal_error_rate(answers.reshape(len(labels), -1)[:, -1], np.asarray(labels).ravel() > 0)

    return "1 - EER", score, ""


OPENED: Final[Mapping[type[Any], Callable[[Any, ModelSpec, Path], Opened]]] = {
    FunctionScore: _function,
    DetectionScore: _detection,
    SequenceScore: _sequence,
    SegmentationScore: _segmentation,
    VerificationScore: _verification,
}
