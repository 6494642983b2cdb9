"""The config section `score:`: how answers are judged against labels where no accuracy, R squared or correlation does.

Its first key says how. Names are those of outputs of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from leanserve.config.section import Section

COCO = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))


class _Score(Section):
    kind: ClassVar[str]


class FunctionScore(_Score):
    """A function of the user's own."""

    kind: ClassVar[str] = "function"
    function: str = Field(
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="package.module:function, found beside the config file or installed; `score: module:function` is "
        "short for it",
    )


class DetectionScore(_Score):
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


class SequenceScore(_Score):
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


class SegmentationScore(_Score):
    """Mean intersection over union of maps of classes."""

    kind: ClassVar[str] = "segmentation"
    segmentation: str = Field(description="output of class numbers like the labels, or of one number per class")
    ignored: int | None = Field(
        None, description="class number in the labels that does not count; nor do those below 0"
    )


class VerificationScore(_Score):
    """1 - the equal error rate."""

    kind: ClassVar[str] = "verification"
    verification: str = Field(
        description="output of embeddings, all pairs of which are compared (labels are identities); or of one number, "
        "higher for the genuine (labels are 0 and 1)"
    )


SCORE_FORMS: tuple[type[_Score], ...] = (
    FunctionScore,
    DetectionScore,
    SequenceScore,
    SegmentationScore,
    VerificationScore,
)


def _form(value: Any) -> str | None:
    if isinstance(value, Mapping):
        return next((f"score.{form.kind}" for form in SCORE_FORMS if form.kind in value), None)
    return f"score.{value.kind}" if isinstance(value, SCORE_FORMS) else None


def _named(value: Any) -> Any:
    return {"function": value} if isinstance(value, str) else value


AnyScore = Annotated[
    Annotated[FunctionScore, Tag("score.function")]
    | Annotated[DetectionScore, Tag("score.detection")]
    | Annotated[SequenceScore, Tag("score.sequence")]
    | Annotated[SegmentationScore, Tag("score.segmentation")]
    | Annotated[VerificationScore, Tag("score.verification")],
    Discriminator(
        _form,
        custom_error_type="score_form",
        custom_error_message="a score is package.module:function, or a mapping with one of the keys "
        + ", ".join(form.kind for form in SCORE_FORMS),
    ),
    BeforeValidator(_named),
]
