"""The examples `detector` and `text-lines`: their configs, with graphs of the same shapes as the real models.

The real models are not in this repository; what they answered is in the examples' READMEs. The graphs here give what is
written into them, so that every box and letter is known.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import yaml
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from leanserve.context import AppContext
from leanserve.contracts import Array, OnnxModel, Placement
from leanserve.errors import ConfigError

EXAMPLES = Path(__file__).parent.parent / "examples"
LABELS = [f"class{number}" for number in range(18)]
CHARACTERS = [chr(0x4E00 + number) for number in range(6623)]


def save(path: Path, nodes: list[Any], shapes: tuple[list[Any], list[Any]], constants: dict[str, Array]) -> None:
    taken, given = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in zip(("images", "output0"), shapes, strict=True)
    )
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "made", [taken], [given], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def detector(path: Path) -> None:
    """Proposals around a box of 64 x 32 at (100, 50), of class 3, with the mean of a blue corner as the score."""
    output = np.zeros((1, 22, 2100), np.float32)
    output[0, :4, :3] = np.array([[132, 66, 64, 32], [133, 66, 64, 32], [300, 300, 9, 9]]).T
    scale = np.zeros_like(output)
    scale[0, 4 + 3, :3] = [0.9, 0.8, 0.1]
    nodes = [
        helper.make_node("Slice", ["images", "from", "to"], ["corner"]),
        helper.make_node("ReduceMean", ["corner"], ["mean"], axes=[1, 2, 3]),
        helper.make_node("Squeeze", ["mean", "axis"], ["blue"]),
        helper.make_node("Mul", ["blue", "scale"], ["scores"]),
        helper.make_node("Add", ["scores", "boxes"], ["output0"]),
    ]
    constants = {
        "from": np.array([0, 0, 0, 0]),
        "to": np.array([2**31 - 1, 1, 8, 8]),
        "axis": np.array([3]),
        "scale": scale,
        "boxes": output,
    }
    save(path, nodes, (["n", 3, "height", "width"], ["n", 22, 2100]), constants)


def recogniser(path: Path) -> None:
    """A step of eight columns each: the character whose number is 100 times the mean of the blue channel there."""
    nodes = [
        helper.make_node("Slice", ["images", "from", "to"], ["blue"]),
        helper.make_node("AveragePool", ["blue"], ["pooled"], kernel_shape=[48, 8], strides=[48, 8]),
        helper.make_node("Squeeze", ["pooled", "axes"], ["steps"]),
        helper.make_node("Unsqueeze", ["steps", "last"], ["column"]),
        helper.make_node("Sub", ["column", "numbers"], ["apart"]),
        helper.make_node("Abs", ["apart"], ["distance"]),
        helper.make_node("Neg", ["distance"], ["output0"]),
    ]
    constants = {
        "from": np.array([0, 0, 0, 0]),
        "to": np.array([2**31 - 1, 1, 48, 2**31 - 1]),
        "axes": np.array([1, 2]),
        "last": np.array([2]),
        "numbers": (np.arange(6625, dtype=np.float32) / 100 - 1)[None, None],
    }
    save(path, nodes, (["n", 3, 48, "width"], ["n", "steps", 6625]), constants)


class Example:
    """The example as the service opens it, with a graph in the place of its model; `ask` is a request without HTTP."""

    def __init__(self, name: str, folder: Path, make: Callable[[Path], None]) -> None:
        config = yaml.safe_load((EXAMPLES / name / "config.yaml").read_text())
        config["data"] = {"synthetic": 16}  # the images are made beside the real model
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "labels.txt").write_text("\n".join(LABELS) + "\n")
        (folder / "characters.txt").write_text("\n".join(CHARACTERS) + "\n", encoding="utf-8")
        make(folder / config["base"]["onnx"])
        work = AppContext(folder / "config.yaml", None, make_cache=False)
        self.base, self.post = work.base, work.post
        model = self.base.model()
        assert isinstance(model, OnnxModel)
        self.session = onnxruntime.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])

    def ask(self, pixels: Array) -> dict[str, Any]:
        stream = BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        decoded = self.base.codec.decode("image/png", stream.getvalue())
        outputs: Any = self.session.run(None, {self.base.spec.inputs[0].name: decoded.inputs[0]})
        places = [place for place in decoded.places if isinstance(place, Placement)]
        found = self.post.answers(tuple(outputs), self.base.spec, places, self.post.ends)
        return {name: columns.of_rows(1)[0] for name, columns in found.items()}


def test_boxes_are_found_in_pixels_of_the_image(tmp_path: Path) -> None:
    example = Example("detector", tmp_path, detector)
    pixels = np.zeros((600, 640, 3), np.uint8)
    pixels[..., 2] = 255  # blue, which the network gets first
    [box] = example.ask(pixels)["boxes"]
    assert (box["box"].tolist(), box["label"]) == ([200, 100, 328, 164], "class3")
    assert box["score"] == pytest.approx(0.9)
    assert example.ask(pixels[..., ::-1])["boxes"] == []


def test_lines_of_any_width_are_read(tmp_path: Path) -> None:
    example = Example("text-lines", tmp_path, recogniser)
    for width, numbers in ((64, (1, 2, 2)), (96, (3, 0, 3, 150))):
        line = np.zeros((48, width, 3))
        blue = np.repeat([number * 1.275 for number in numbers], 8)
        line[:, : len(blue), 2] = blue
        runs = [number for number, _ in groupby((*numbers, 0)) if number]
        read = example.ask(line.round().astype(np.uint8))["text"]["value"]
        assert read == "".join(CHARACTERS[number - 1] for number in runs)


def test_another_step_builds_nothing_anew_and_a_wrong_one_is_refused_by_check(tmp_path: Path) -> None:
    Example("detector", tmp_path, detector)
    path = tmp_path / "config.yaml"
    config = yaml.safe_load(path.read_text())

    def planned(*steps: dict[str, Any]) -> tuple[str, ...]:
        path.write_text(yaml.safe_dump(config | {"postprocess": list(steps)}))
        return AppContext(path, tmp_path / "cache").plan.keys

    assert planned(config["postprocess"][0]) == planned(config["postprocess"][0] | {"min_score": 0.9}) == planned()
    with pytest.raises(ConfigError, match=r"postprocess\[0\] \(ctc\): characters: 1 characters and the blank are 2"):
        planned({"kind": "ctc", "characters": ["a"]})
    with pytest.raises(ConfigError, match=r"config.yaml:\d+: postprocess.0.*unknown step 'nsm'; did you mean 'nms'"):
        planned({"kind": "nsm"})
    with pytest.raises(ConfigError, match=r"config.yaml:\d+: postprocess.0.*unknown key 'min_scores'; did you mean"):
        planned({"kind": "nms", "min_scores": 1})
