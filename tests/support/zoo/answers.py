"""What the libraries that ship a model make of its outputs, with their own code, and the steps of a config that are to
do the same: labels, boxes and texts on images, where there is something to find."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np

from zoo.reference import Array
from zoo.wheels import unpacked

OCR, NUDE, OPENCV = "rapidocr-onnxruntime==1.4.4", "nudenet==3.4.2", "opencv-python-headless==5.0.0.93"
LINES = ("Hello World", "Total: 1,234.56 EUR", "INVOICE No. 4711", "The quick brown fox")
PIXEL = 1
"""By which a coordinate may differ: the libraries round down what they computed in another order."""


@dataclass(frozen=True)
class Answers:
    """How answers are made of a model's outputs, here and by its own library."""

    steps: Sequence[Mapping[str, Any]]
    """The section `postprocess`."""
    files: Callable[[], Mapping[str, Sequence[str]]]
    """Lines of the files that the steps name."""
    rows: Callable[[], Sequence[Array]]
    """Images as the model takes them, each with an axis of one row."""
    own: Callable[[Sequence[Array]], Any]
    """The library's answer for the outputs of a row."""
    told: Callable[[Mapping[str, Array]], Any]
    """The same of what a service told, by the names of its arrays."""

    def agree(self, told: Mapping[str, Array], outputs: Sequence[Array]) -> bool:
        """Whether the service told what the library makes of the original's outputs; nothing found is no agreement."""
        ours, theirs = self.told(told), self.own(outputs)
        return bool(theirs) and len(ours) == len(theirs) and all(map(_alike, ours, theirs))


def _alike(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, str):
        return bool(ours == theirs)
    return bool(abs(ours - theirs) <= (PIXEL if isinstance(theirs, int) else 1e-3))


def texts() -> Answers:
    """The recogniser of RapidOCR on rendered lines."""
    return Answers(
        [{"kind": "ctc", "characters": "characters.txt", "space": True}],
        lambda: {"characters.txt": _characters()},
        lambda: [_scaled(_rendered(line), None) for line in LINES],
        lambda outputs: list(_ocr("ch_ppocr_rec").CTCLabelDecode(character=_characters())(outputs[0])[0]),
        lambda told: [_text(told["text.value"][0]), float(told["text.score"][0])],
    )


def directions() -> Answers:
    """The classifier of RapidOCR on lines of which every second one is upside down."""
    return Answers(
        [{"kind": "top_k", "k": 1, "labels": "directions.txt"}],
        lambda: {"directions.txt": ["0", "180"]},
        lambda: [_scaled(_rendered(line)[:: 1 - 2 * (number % 2)], 192) for number, line in enumerate(LINES)],
        lambda outputs: [*_direction(outputs[0])],
        lambda told: [_text(told["top.label"].flat[0]), float(told["top.score"].flat[0])],
    )


def boxes() -> Answers:
    """The detector of NudeNet on the portrait that comes with matplotlib."""
    return Answers(
        [
            {"kind": "nms", "proposals": "last", "labels": "labels.txt", "per_class": False}
            | {"min_score": 0.25, "max_overlap": 0.45}
        ],
        lambda: {"labels.txt": _detector().__labels},
        lambda: [_portrait()],
        lambda outputs: [value for found in _found(outputs) for value in found],
        lambda told: [
            value
            for box, label, score in zip(told["boxes.box"], told["boxes.label"], told["boxes.score"], strict=True)
            for value in (*_corner_and_size(box), _text(label), float(score))
        ],
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _rendered(text: str) -> Array:
    """A line of text, black on white, uint8 [height, width, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=32)
    left, top, right, bottom = map(round, font.getbbox(text))
    image = Image.new("RGB", (right - left + 16, bottom - top + 16), "white")
    ImageDraw.Draw(image).text((8 - left, 8 - top), text, "black", font)
    return np.asarray(image)


def _scaled(image: Array, width: int | None) -> Array:
    """48 pixels high, from -1 to 1, blue first, and where a width is given so wide: float32 [1, 3, 48, width]."""
    from PIL import Image

    own = round(48 * image.shape[1] / image.shape[0])
    scaled = Image.fromarray(image).resize((own if width is None else min(own, width), 48))
    numbers = np.asarray(scaled, np.float32)[..., ::-1].transpose(2, 0, 1) / 127.5 - 1
    room = 0 if width is None else width - numbers.shape[2]
    return np.ascontiguousarray(np.pad(numbers, ((0, 0), (0, 0), (0, room)))[None], np.float32)


def _portrait() -> Array:
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    with Image.open(str(get_sample_data("grace_hopper.jpg", asfileobj=False))) as image:
        side = max(image.size)
        square = Image.new("RGB", (side, side))
        square.paste(image)
    numbers = np.asarray(square.resize((320, 320)), np.float32)[..., ::-1].transpose(2, 0, 1) / 255
    return np.ascontiguousarray(numbers[None])


def _characters() -> list[str]:
    import onnx

    path = unpacked(OCR) / "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"
    told = {item.key: item.value for item in onnx.load(path).metadata_props}
    return list(map(str, told["character"].splitlines()))


def _direction(output: Array) -> tuple[str, float]:
    [(label, score)] = _ocr("ch_ppocr_cls").ClsPostProcess(["0", "180"])(output)
    return label, float(score)


def _found(outputs: Sequence[Array]) -> list[tuple[Any, ...]]:
    """Left, top, width, height, label and score of every box, as the library has it for an image of 320 x 320."""
    found = _detector()._postprocess(list(outputs), 0, 0, 1, 1, 320, 320, 320, 320)
    return [(*item["box"], item["class"], item["score"]) for item in found]


def _corner_and_size(box: Array) -> tuple[int, int, int, int]:
    left, top, right, bottom = (float(side) for side in box)
    return int(left), int(top), int(right - left), int(bottom - top)


def _ocr(package: str) -> Any:
    return _module(unpacked(OCR) / "rapidocr_onnxruntime" / package / "utils.py")


def _detector() -> Any:
    """The library's own file; what it needs of OpenCV is on no machine of ours."""
    opencv = str(unpacked(OPENCV))
    if opencv not in sys.path:
        sys.path.append(opencv)
    return _module(unpacked(NUDE) / "nudenet" / "nudenet.py")


def _module(path: Path) -> Any:
    spec = spec_from_file_location(f"zoo_{path.parent.name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
