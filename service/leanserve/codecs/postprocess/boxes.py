"""Boxes of a detector: from thousands of overlapping proposals to the few that are meant, in pixels of the image.

Greedy non-maximum suppression, as torchvision and the operator NonMaxSuppression of ONNX have it: the box with the best
score stays, those that overlap it by more than a share of their union go, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field

from leanserve.codecs.postprocess.classes import CLASS
from leanserve.codecs.postprocess.columns import Columns
from leanserve.codecs.postprocess.step import (
    Labels,
    PostStep,
    classes_told,
    fitting_labels,
    label_names,
    require_no_nan,
    require_numbers,
    shown,
)
from leanserve.contracts import Array, Arrays, Json, Placement, TensorSpec
from leanserve.errors import ConfigError

CANDIDATES = 3000
"""Proposals of a row that are compared with each other, the best ones: bounds the work, whatever a model proposes."""


class _Found(NamedTuple):
    """The boxes of one row."""

    corners: Array
    classes: Array
    scores: Array


class Nms(PostStep):
    """Boxes with their classes and scores.

    `output` has a box (four numbers), if so declared its `objectness`, and a score per class, for every proposal; or
    only boxes, and a second output the `scores`.
    """

    kind: Literal["nms"] = "nms"
    scores: str | None = Field(None, description="a second output, where the scores are not in the same one")
    proposals: Literal["first", "last"] = Field(
        "first", description="the axis that counts proposals: [proposals, numbers], or [numbers, proposals]"
    )
    form: Literal["cxcywh", "xyxy", "xywh"] = Field(
        "cxcywh", description="of a box: centre and size, two corners, or a corner and the size"
    )
    unit: Literal["pixels", "share"] = Field(
        "pixels", description="of a box: the input's pixels, or shares of its sides"
    )
    objectness: bool = Field(default=False, description="a fifth number, by which all scores are multiplied")
    min_score: float = Field(0.25, description="least score of a box")
    max_overlap: float = Field(
        0.45, ge=0, le=1, description="largest share of their union that two boxes have in common"
    )
    max_boxes: int = Field(300, ge=1, le=CANDIDATES, description="most boxes per row, the best ones")
    per_class: bool = Field(default=True, description="boxes of different classes may overlap")
    labels: Labels | None = Field(None, description="class names, or a file; without, classes are told by number")

    writes: ClassVar[str] = "boxes"
    costly: ClassVar[bool] = True
    shape: ClassVar[Json] = {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "box": {"type": "array", "items": {"type": "number"}, "description": "left, top, right, bottom"},
                **CLASS,
            },
            "required": ["box", "score"],
        },
    }

    @property
    def reads(self) -> tuple[str | None, ...]:
        return (self.output,) if self.scores is None else (self.output, self.scores)

    def with_files(self, folder: Path) -> Self:
        return self.model_copy(update={"labels": label_names(self.labels, folder)})

    def fitted(self, fields: Sequence[TensorSpec], labels: tuple[str, ...]) -> Self:
        for field in fields:
            require_numbers(field, 2, "boxes and scores as [proposals, numbers] or [numbers, proposals]")
        if self.scores is not None and self.objectness:
            raise ConfigError("objectness is a number of the same output as the boxes; it goes without scores")
        widths = [field.shape[1 if self.proposals == "first" else 0] for field in fields]
        least = 4 if self.scores is not None else 5 + self.objectness
        if widths[0] is not None and (widths[0] < least or (self.scores is not None and widths[0] != 4)):
            other = "last" if self.proposals == "first" else "first"
            raise ConfigError(
                f"a proposal takes {'4' if self.scores is not None else f'at least {least}'} numbers, and "
                f"{shown(fields[0])} has {widths[0]}; is it proposals: {other}?"
            )
        last = widths[-1]
        classes = None if last is None else last - (0 if self.scores is not None else 4 + self.objectness)
        return self.model_copy(update={"labels": fitting_labels(self.labels, labels, classes)})

    def apply(self, arrays: Arrays, places: Sequence[Placement]) -> Columns:
        for array in arrays:
            require_no_nan(array, self.output or "boxes")
        numbers = [array if self.proposals == "first" else array.swapaxes(1, 2) for array in arrays]
        rows = [self._row(*row) for row in zip(*numbers, strict=True)]
        if places:
            rows = [self._seen(found, place) for found, place in zip(rows, places, strict=True)]
        assert not isinstance(self.labels, Path)
        classes = np.concatenate([found.classes for found in rows])
        told = {
            "box": np.concatenate([found.corners for found in rows]),
            **classes_told(classes, self.labels),
            "score": np.concatenate([found.scores for found in rows]),
        }
        return Columns(told, np.repeat(np.arange(len(rows)), [len(found.scores) for found in rows]))

    def _row(self, boxes: Array, scores: Array | None = None) -> _Found:
        """Boxes [proposals, 4 or more] and scores [proposals, classes] -> those that are left."""
        if scores is None:
            scores = boxes[:, 4 + self.objectness :]
            scores = scores * boxes[:, 4:5] if self.objectness else scores
        classes = scores.argmax(axis=1)
        high = np.take_along_axis(scores, classes[:, None], axis=1)[:, 0]
        able = np.flatnonzero(high >= self.min_score)
        able = able[np.argsort(-high[able], kind="stable")][:CANDIDATES]
        corners = corners_of(boxes[able, :4].astype(np.float32), self.form)
        kept = suppressed(corners, classes[able] if self.per_class else None, self.max_overlap, self.max_boxes)
        return _Found(corners[kept], classes[able][kept], high[able][kept])

    def _seen(self, found: _Found, place: Placement) -> _Found:
        """In pixels of the image, as far as it goes."""
        one = place.input if self.unit == "share" else (1, 1)
        unit, shift, scale, edge = (
            np.array(pair * 2, np.float32) for pair in (one, place.offset, place.scale, place.size)
        )
        return found._replace(corners=np.clip((found.corners * unit - shift) / scale, 0, edge))


def corners_of(boxes: Array, form: Literal["cxcywh", "xyxy", "xywh"]) -> Array:
    """Boxes [n, 4] as left, top, right, bottom."""
    if form == "xyxy":
        return boxes
    sizes = boxes[:, 2:]
    starts = boxes[:, :2] - sizes / 2 if form == "cxcywh" else boxes[:, :2]
    return np.concatenate([starts, starts + sizes], axis=1)


def suppressed(corners: Array, classes: Array | None, max_overlap: float, most: int) -> Array:
    """Positions of the boxes [n, 4] that stay; they come best first, and only those of one class exclude each other."""
    areas = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    left = np.arange(len(corners))
    kept: list[int] = []
    while len(left) and len(kept) < most:
        first, left = left[0], left[1:]
        kept.append(int(first))
        starts = np.maximum(corners[first, :2], corners[left, :2])
        sides = np.maximum(np.minimum(corners[first, 2:], corners[left, 2:]) - starts, 0)
        common = sides[:, 0] * sides[:, 1]
        goes = common > max_overlap * (areas[first] + areas[left] - common)
        if classes is not None:
            goes &= classes[left] == classes[first]
        left = left[~goes]
    return np.array(kept, np.int64)
