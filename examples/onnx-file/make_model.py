"""Make what the config names, so that the example runs anywhere: an ONNX file and arrays, in a few seconds.

The stand-in is small but real: a net of three layers that reads scikit-learn's handwritten digits as 64 numbers. It is
written as exporters often write them, for a batch of one row. Replace both files by your own; labels can be left out.

    python make_model.py [FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

HIDDEN = (512, 512)
BRIGHTEST = 16
"""Pixels are whole numbers up to this one; the net divides by it."""


def main(folder: Path) -> None:
    """Write model.onnx and digits.npz into the folder."""
    pixels, labels = load_digits(return_X_y=True)
    seen, rest = np.split(np.random.default_rng(0).permutation(len(pixels)), [900])
    network = MLPClassifier(HIDDEN, max_iter=30, early_stopping=True, random_state=0)
    network.fit(pixels[seen] / BRIGHTEST, labels[seen])
    onnx.save(graph(network.coefs_, network.intercepts_), folder / "model.onnx")
    # Only rows that the network has not seen: on the others every variant would look better than it is.
    np.savez_compressed(folder / "digits.npz", pixels=pixels[rest].astype(np.float32), labels=labels[rest])


def graph(weights: list[NDArray[np.float64]], biases: list[NDArray[np.float64]]) -> onnx.ModelProto:
    """Divide, then matrix product and bias per layer, rectified between the layers; gives logits."""
    constants = [numpy_helper.from_array(np.array(BRIGHTEST, np.float32), "brightest")]
    nodes = [helper.make_node("Div", ["pixels", "brightest"], ["x0"])]
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        names = [f"weight{index}", f"bias{index}"]
        arrays = zip((weight, bias), names, strict=True)
        constants += [numpy_helper.from_array(array.astype(np.float32), name) for array, name in arrays]
        if index == len(weights) - 1:
            nodes.append(helper.make_node("Gemm", [f"x{index}", *names], ["logits"], name="head"))
        else:
            nodes.append(helper.make_node("Gemm", [f"x{index}", *names], [f"sum{index}"], name=f"layer{index}"))
            nodes.append(helper.make_node("Relu", [f"sum{index}"], [f"x{index + 1}"]))
    row = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, len(weights[0])])
    answer = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, len(biases[-1])])
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(helper.make_graph(nodes, "digits", [row], [answer], constants), opset_imports=opset)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the files that config.yaml names.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path())
    main(parser.parse_args().folder)
