"""Graphs that take words, as converters of scikit-learn write them."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CITIES, KINDS, CLASSES = ("Bern", "Rome"), ("a", "b", "c", "d"), ("no", "yes")
ML = "ai.onnx.ml"


def one_hot(*, strict: bool = True) -> onnx.ModelProto:
    """x string [rows, 2] (a city, a kind) -> label string [rows], scores float32 [rows, 2], which are probabilities.

    `strict`: words that it was not made for are errors.
    """
    nodes = []
    for column, words in enumerate((CITIES, KINDS)):
        nodes += [
            helper.make_node("ArrayFeatureExtractor", ["x", f"at{column}"], [f"word{column}"], domain=ML),
            helper.make_node(
                "OneHotEncoder",
                [f"word{column}"],
                [f"hot{column}"],
                domain=ML,
                cats_strings=words,
                zeros=0 if strict else 1,
            ),
            helper.make_node("Reshape", [f"hot{column}", f"wide{column}"], [f"flat{column}"]),
        ]
    nodes += [
        helper.make_node("Concat", ["flat0", "flat1"], ["features"], axis=1),
        helper.make_node(
            "LinearClassifier",
            ["features"],
            ["label", "scores"],
            domain=ML,
            classlabels_strings=CLASSES,
            coefficients=[-2.0, 2.0, 0.5, 0.0, -1.0, 0.1, 2.0, -2.0, -0.5, 0.0, 1.0, -0.1],
            intercepts=[0.0, 0.1],
            multi_class=0,
            post_transform="SOFTMAX",
        ),
    ]
    weights = {
        **{f"at{column}": np.array([column]) for column in (0, 1)},
        **{f"wide{column}": np.array([-1, len(words)]) for column, words in enumerate((CITIES, KINDS))},
    }
    tensor = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes,
        "words",
        [tensor("x", TensorProto.STRING, ["rows", 2])],
        [tensor("label", TensorProto.STRING, ["rows"]), tensor("scores", TensorProto.FLOAT, ["rows", 2])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(ML, 3)]
    return helper.make_model(made, opset_imports=opsets, ir_version=8)


def lower_case() -> onnx.ModelProto:
    """text string [rows] -> known bool [rows]: whether it is `red` or `blue` in small or capital letters."""
    nodes = [
        helper.make_node("StringNormalizer", ["text"], ["small"], case_change_action="LOWER", is_case_sensitive=0),
        helper.make_node("LabelEncoder", ["small"], ["known"], domain=ML, keys_strings=["red", "blue"],
                         values_int64s=[1, 2], default_int64=0),
    ]  # fmt: skip
    tensor = helper.make_tensor_value_info
    ends = [tensor("text", TensorProto.STRING, ["rows"])], [tensor("known", TensorProto.INT64, ["rows"])]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(ML, 2)]
    return helper.make_model(helper.make_graph(nodes, "small", *ends), opset_imports=opsets, ir_version=8)
