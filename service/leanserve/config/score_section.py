"""The config section `score:`: how answers are judged against labels where no accuracy, R squared or correlation does.

Its first key says how. Names are those of outputs of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, Tag

from leanserve.config.section import Form, short_for, told_by_key

COCO = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))


class FunctionScore(Form):
    """A function of the user's own."""

    kind: ClassVar[str] = "function"
    function: str = Field(
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="package.module:function, found beside the config file or installed; `score: module:function` is "
        "short for it",
    )


class DetectionScore(Form):
    """Mean average precision of boxes."""

    kind: ClassVar[str] = "detection"
    detection: str = Field(description="output of boxes [detections, 4] as x1, y1, x2, y2")
    scores: str = Field(description="output of their scores, one per detection, or one per detection and class")
    classes: str | None = Field(
        None, description="output of their class numbers; none: by the scores, or a single class"
    )
    overlaps: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        COCO, min_length=1, description="least intersection over union of a hit; the mean over all of them counts"
    )


class SequenceScore(Form):
    """1 - the error rate of texts or of tokens."""

    kind: ClassVar[str] = "sequence"
    sequence: str = Field(description="output of token ids [steps], or of one number per id [steps, ids]")
    symbols: Literal["character", "word", "token"] = Field(
        "token", description="what is counted: CER, WER, or the ids themselves"
    )
    alphabet: str | Path | None = Field(
        None, description="what the ids stand for: a text, id by id, or a text file with one per line"
    )
    blank: int | None = Field(None, ge=0, description="of CTC: this id is nothing, and repeated ids are one")


class SegmentationScore(Form):
    """Mean intersection over union of maps of classes."""

    kind: ClassVar[str] = "segmentation"
    segmentation: str = Field(description="output of class numbers like the labels, or of one number per class")
    ignored: int | None = Field(
        None, description="class number in the labels that does not count; nor do those below 0"
    )


class VerificationScore(Form):
    """1 - the equal error rate."""

    kind: ClassVar[str] = "verification"
    verification: str = Field(
        description="output of embeddings, all pairs of which are compared (labels are identities); or of one number, "
        "higher for the genuine (labels are 0 and 1)"
    )


SCORE_FORMS: tuple[type[Form], ...] = (
    FunctionScore,
    DetectionScore,
    SequenceScore,
    SegmentationScore,
    VerificationScore,
)


AnyScore = Annotated[
    Annotated[FunctionScore, Tag("score.function")]
    | Annotated[DetectionScore, Tag("score.detection")]
    | Annotated[SequenceScore, Tag("score.sequence")]
    | Annotated[SegmentationScore, Tag("score.segmentation")]
    | Annotated[VerificationScore, Tag("score.verification")],
    told_by_key("score", SCORE_FORMS, "a score is package.module:function, or"),
    short_for("function"),
]
