"""Sounds in: the codec of models that take samples.

Bodies:
- `audio/wav`, `audio/flac`: one recording; `audio/*`, `application/octet-stream` or no type: what it begins like;
- `multipart/form-data`: recordings, see `leanserve.codecs.uploads`;
- `application/json`: `{"inputs": ...}` with files in base64, or with samples at the model's rate.

Every recording becomes mono at the model's rate. A model of fixed length gets it in frames, each of which is a row; the
last one is filled up with silence. One of any length gets it whole. docs/audio.md says it in detail.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import NamedTuple

import numpy as np

from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.audio_files import (
    AUDIO_FORMATS,
    UNTOLD_AUDIO,
    AudioFormat,
    EncodedSound,
    OpenedSound,
    audio_format_of,
    audio_types,
    mono_at,
    opened_sound,
    require_libraries,
)
from leanserve.codecs.json_body import inputs_of
from leanserve.codecs.json_weight import json_seconds
from leanserve.codecs.nested import array_of, sizes_of
from leanserve.codecs.uploads import FORM, file_of_json, files_of_form, holds_file
from leanserve.contracts import Array, Arrays, Decoded, Json, Span, TensorSpec, Weighed
from leanserve.errors import BadInput, BodyTooLarge, UnsupportedMediaType

JSON = "application/json"
MOST_FILES = 256
SAMPLE_S = 7e-9
"""Seconds to decode a sample of FLAC, and to resample one; WAV takes a quarter of it."""
PARSED_AT_ONCE_S = 2e-3
"""Seconds that parsing JSON may take to find the files in it, whose headers tell what else it takes."""


class _Made(NamedTuple):
    """Rows that come of a recording, and samples in each."""

    rows: int
    length: int


@dataclass(frozen=True, slots=True)
class AudioCodec:
    """Codec of a base that takes one float32 input of samples: [n], [1, n] or [n, 1], where n is `None` for any length.

    `rate` is samples per second, `hop` those between the beginnings of two frames (`None`: as many as a frame has).
    `max_seconds` bounds the recordings of a request together, `max_decoded` their samples as stored, `max_elements`
    what the model gets of them, overlapping frames and padding included.
    """

    rate: int
    answers: AnswerEncoder
    hop: int | None = None
    formats: tuple[AudioFormat, ...] = AUDIO_FORMATS
    max_seconds: float = 600.0
    max_decoded: int = 2**26
    max_elements: int = 2**24

    def __post_init__(self) -> None:
        require_libraries()

    @property
    def media_types(self) -> tuple[str, ...]:
        return (*audio_types(self.formats), *filter(None, UNTOLD_AUDIO), FORM, JSON)

    @property
    def field(self) -> TensorSpec:
        """The input."""
        return self.answers.spec.inputs[0]

    @property
    def frame(self) -> int | None:
        """Samples of a row; `None`: any number."""
        shape = self.field.shape
        return None if None in shape else max(size for size in shape if size is not None)

    def prepare(self, media_type: str, body: bytes) -> Weighed[Decoded]:
        """Read the headers of all recordings; of a large body of JSON only count what is in it. Raises as `decode`."""
        kind = media_type.partition(";")[0].strip().lower()
        if kind == JSON:
            seconds = json_seconds(body)
            parse = partial(self._of_json, body)
            return Weighed(seconds, lambda: parse().finish()) if seconds > PARSED_AT_ONCE_S else parse()
        if kind == FORM:
            files = files_of_form(media_type, body, MOST_FILES)
            sounds = (EncodedSound(file.media_type, file.content, file.where) for file in files)
            return self._looked_at(map(self._opened, sounds))
        if kind not in UNTOLD_AUDIO and audio_format_of(kind) not in self.formats:
            raise UnsupportedMediaType(f"content type {media_type!r} is none of {', '.join(self.media_types)}")
        return self._looked_at([self._opened(EncodedSound(kind, body, "the body"))])

    def decode(self, media_type: str, body: bytes) -> Decoded:
        """Body -> float32 samples, one row per frame or per recording.

        Raises:
            BadInput: the body is not what its media type says; the text says where.
            BodyTooLarge: the recordings are longer than is taken.
            UnsupportedMediaType: none of `media_types`.
        """
        return self.prepare(media_type, body).finish()

    def count_rows(self, content: bytes) -> int:
        """Rows that come of a recording, by its header; raises as `decode`. Resampling may make it one less."""
        return self._made_of(self._opened(EncodedSound("", content, "the body"))).rows

    def encode(self, outputs: Arrays, most: int | None = None) -> list[dict[str, Json]]:
        """One answer per row, see `leanserve.codecs.answers`."""
        return self.answers.encode(outputs, most)

    def frames(self, samples: Array) -> Array:
        """Samples [n] of any length -> rows [frames, samples of a frame], the last one filled up with silence."""
        frame = self.frame
        if frame is None:
            room = self.answers.spec.size(len(samples))
            return np.pad(samples, (0, room - len(samples)))[None]
        hop = self.hop or frame
        count = _frames_of(len(samples), frame, hop)
        padded = np.pad(samples, (0, max(0, (count - 1) * hop + frame - len(samples))))
        windows = np.lib.stride_tricks.sliding_window_view(padded, frame)[::hop][:count]
        return np.ascontiguousarray(windows)

    def _of_json(self, body: bytes) -> Weighed[Decoded]:
        return self._looked_at(self._from_json(inputs_of(body)))

    def _looked_at(self, recordings: Iterable[OpenedSound]) -> Weighed[Decoded]:
        waiting = self._bounded(recordings)
        made = [self._made_of(recording) for recording in waiting]
        samples = sum(recording.work + recording.frames for recording in waiting)
        samples += sum(item.rows * item.length for item in made)
        return Weighed(samples * SAMPLE_S, partial(self._decoded, waiting))

    def _decoded(self, waiting: deque[OpenedSound]) -> Decoded:
        rows: list[Array] = []
        places: list[Span] = []
        for number in range(len(waiting)):
            samples = mono_at(waiting.popleft(), self.rate)
            found = self.frames(samples)
            rows.extend(found)
            places.extend(self._spans(number, len(samples), len(found)))
        lengths = tuple(map(len, rows)) if self.frame is None else ()
        longest = max(map(len, rows))
        batch = np.zeros((len(rows), longest), np.float32)
        for place, row in zip(batch, rows, strict=True):
            place[: len(row)] = row
        shape = [longest if size is None or size == longest else size for size in self.field.shape]
        return Decoded((batch.reshape(len(rows), *shape),), len(rows) > 1, lengths, tuple(places), tells_places=True)

    def _spans(self, file: int, samples: int, rows: int) -> Iterable[Span]:
        frame = self.frame or max(1, samples)
        for start in range(0, rows * (self.hop or frame), self.hop or frame):
            end = min(start + frame, samples)
            yield Span(file, round(start / self.rate, 6), round(end / self.rate, 6))

    def _bounded(self, recordings: Iterable[OpenedSound]) -> deque[OpenedSound]:
        """The recordings, none of them decoded; refuses what would take too much memory or time."""
        waiting: deque[OpenedSound] = deque()
        seconds, decoded, longest = 0.0, 0, 0
        rows = 0
        for recording in recordings:
            waiting.append(recording)
            seconds += recording.seconds
            decoded += recording.work
            made = self._made_of(recording)
            rows, longest = rows + made.rows, max(longest, made.length)
            self._require(seconds <= self.max_seconds, waiting, f"{seconds:.1f} s; at most {self.max_seconds:g} s")
            self._require(decoded <= self.max_decoded, waiting, f"{decoded} samples; at most {self.max_decoded}")
            made_of_all = rows * longest
            told = f"{made_of_all} samples of the model's rows; at most {self.max_elements}"
            self._require(made_of_all <= self.max_elements, waiting, told)
        return waiting

    def _require(self, fits: bool, waiting: Sequence[OpenedSound], told: str) -> None:  # noqa: FBT001 - as of assert
        if not fits:
            what = "the recording has" if len(waiting) == 1 else f"{len(waiting)} recordings have together"
            raise BodyTooLarge(f"{waiting[-1].where}: {what} {told} are taken")

    def _made_of(self, recording: OpenedSound) -> _Made:
        samples = ceil(recording.seconds * self.rate)
        frame = self.frame
        if frame is not None:
            return _Made(_frames_of(samples, frame, self.hop or frame), frame)
        longest = self.answers.spec.max_length
        if samples > longest:
            told = f"{recording.seconds:.1f} s; the model takes at most {longest / self.rate:g} s"
            raise BodyTooLarge(f"{recording.where} lasts {told}")
        return _Made(1, self.answers.spec.size(samples))

    def _opened(self, file: EncodedSound) -> OpenedSound:
        return opened_sound(file, self.formats)

    def _from_json(self, inputs: Json) -> Iterable[OpenedSound]:
        many = isinstance(inputs, list) and bool(inputs) and isinstance(inputs[0], list | dict | str)
        values = inputs if many else [inputs]
        if len(values) > MOST_FILES:
            raise BodyTooLarge(f"{len(values)} recordings are more than the {MOST_FILES} that one request may have")
        for number, value in enumerate(values):
            where = f"inputs[{number}]" if many else "inputs"
            if holds_file(value):
                file = file_of_json(value, where)
                yield self._opened(EncodedSound(file.media_type, file.content, file.where))
            else:
                yield self._samples(value, where)

    def _samples(self, value: Json, where: str) -> OpenedSound:
        sizes = sizes_of(value)
        found = array_of(value, np.dtype(np.float32), sizes) if len(sizes) == 1 and sizes[0] else None
        if found is None:
            raise BadInput(
                f'{where}: expected a file ({{"b64": ...}}) or a list of samples from -1 to 1, {self.rate} per second'
            )
        return OpenedSound(found, where, len(found), self.rate)


def _frames_of(samples: int, frame: int, hop: int) -> int:
    """Frames of which the last one reaches the end."""
    return 1 + max(0, -(-(samples - frame) // hop))
