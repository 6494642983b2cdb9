"""Text of a recogniser: the best character of every step, repetitions and blanks left out (greedy CTC).

Source: Graves et al., Connectionist Temporal Classification (2006), best path decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from leanserve.codecs.postprocess.columns import Columns
from leanserve.codecs.postprocess.step import PostStep, lines_of, require_no_nan, require_numbers
from leanserve.contracts import Arrays, Json, Placement, TensorSpec
from leanserve.errors import ConfigError


class Ctc(PostStep):
    """Scores of characters per step, [steps, characters], to a text and the mean score of its characters.

    The scores tell the best character whatever they are; the score of the text is a probability where they are.
    """

    kind: Literal["ctc"] = "ctc"
    characters: tuple[str, ...] | Path = Field(description="all but the blank, in order; or a file with one per line")
    blank: Literal["first", "last"] = Field("first", description="the place of the blank among the characters")
    space: bool = Field(default=False, description="a space follows the last character, as PaddleOCR has it")

    writes: ClassVar[str] = "text"
    shape: ClassVar[Json] = {
        "type": "object",
        "properties": {"value": {"type": "string"}, "score": {"type": "number"}},
        "required": ["value", "score"],
    }

    def with_files(self, folder: Path) -> Self:
        if not isinstance(self.characters, Path):
            return self
        lines = (line.removesuffix("\r") for line in lines_of(folder, self.characters, "characters"))
        return self.model_copy(update={"characters": tuple(lines)})

    def fitted(self, fields: Sequence[TensorSpec], labels: tuple[str, ...]) -> Self:
        [field] = fields
        require_numbers(field, 2, "scores [steps, characters]")
        known = len(self._alphabet())
        if field.shape[1] not in {None, known}:
            told = f"{known - 1} characters{', the space included,' if self.space else ''} and the blank"
            raise ConfigError(f"characters: {told} are {known}; the model tells {field.shape[1]} apart")
        return self

    def apply(self, arrays: Arrays, places: Sequence[Placement]) -> Columns:
        [scores] = arrays
        require_no_nan(scores, self.output or "scores")
        alphabet = self._alphabet()
        blank = alphabet.index(None)
        path = scores.argmax(axis=2)
        kept = path != blank
        kept[:, 1:] &= path[:, 1:] != path[:, :-1]
        high = np.take_along_axis(scores, path[..., None], axis=2)[..., 0]
        texts = ["".join(str(alphabet[number]) for number in row[keep]) for row, keep in zip(path, kept, strict=True)]
        means = (high * kept).sum(axis=1) / np.maximum(kept.sum(axis=1), 1)
        return Columns({"value": np.array(texts, object), "score": means.astype(np.float32)})

    def _alphabet(self) -> list[str | None]:
        """By number; the blank is `None`."""
        assert not isinstance(self.characters, Path)
        told = [*self.characters, *([" "] if self.space else [])]
        return [None, *told] if self.blank == "first" else [*told, None]
