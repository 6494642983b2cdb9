"""How well variants of `minilm` rank pairs of sentences by likeness: Spearman's correlation with what people said.

    leanserve export --config models/minilm.yaml --variant onnx   # and int8, ...
    python -m loadtest.benchmarks.sentence_pairs stsb_dev.csv float/model.onnx int8/model.onnx

The file has a pair and its likeness in every line, as the STS benchmark has them. Models are ONNX graphs or OpenVINO's
files (.xml); the first is the one to which the embeddings of all others are compared.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanserve.contracts import ModelSpec, OnnxModel, Share, TensorSpec
from leanserve.runtime.formats import open_backend
from leanserve.runtime.formats.openvino import OpenVinoModel
from leanserve_models import minilm

Floats = NDArray[np.float32]
DECLARED: tuple[Any, Any] = (minilm.INPUTS, minilm.OUTPUTS)
INPUTS, OUTPUTS = (tuple(TensorSpec(**item) for item in items) for items in DECLARED)
SPEC = ModelSpec(INPUTS, OUTPUTS)
ROWS = 16


def embeddings(path: Path, texts: list[str]) -> Floats:
    """Of length 1, [texts, 384]; texts of like length are run together, as the server's batches are."""
    model = OpenVinoModel(path, SPEC) if path.suffix == ".xml" else OnnxModel(path, SPEC)
    backend = open_backend(model, Share(1))
    tokens = minilm.tokens_of(texts)
    order = sorted(range(len(texts)), key=lambda row: len(tokens[row]))
    made = np.zeros((len(texts), minilm.WIDTH), np.float32)
    for start in range(0, len(order), ROWS):
        rows = order[start : start + ROWS]
        made[rows] = backend.run(minilm.padded([tokens[row] for row in rows])).outputs[0]
    backend.close()
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return made


def main() -> None:
    """Print a line per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    options = parser.parse_args()
    with options.pairs.open(encoding="utf-8", newline="") as file:
        lines = [line for line in csv.reader(file) if line]
    texts = [text for line in lines for text in line[:2]]
    likeness: Any = np.repeat([float(line[2]) for line in lines], 2)
    first: Floats | None = None
    for path in options.models:
        found = embeddings(path, texts)
        first = found if first is None else first
        cosines = (found * first).sum(1)
        like = f"Spearman {minilm.score((found,), likeness):.4f}, cosine {cosines.mean():.4f} / {cosines.min():.4f}"
        print(f"{path}: {like}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
