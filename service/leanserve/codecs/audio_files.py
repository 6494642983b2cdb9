"""A sound file that nobody vouches for: what it is, how long, and its samples, mono at the rate of the model.

The header is read first, so that what is too long is refused before a sample is decoded; and as headers lie, decoding
stops where the header says that the recording ends. libsndfile decodes, libsoxr resamples; both come with the extra
`audio`, and are imported when the first file comes.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from typing import Any, Final, Literal, NamedTuple, get_args

import numpy as np

from leanserve.contracts import Array
from leanserve.errors import BadInput, ConfigError

AudioFormat = Literal["wav", "flac"]
AUDIO_FORMATS: Final[tuple[AudioFormat, ...]] = get_args(AudioFormat)
MEDIA_TYPES: Final[dict[AudioFormat, tuple[str, ...]]] = {
    "wav": ("audio/wav", "audio/x-wav", "audio/wave", "audio/vnd.wave"),
    "flac": ("audio/flac", "audio/x-flac"),
}
"""The one that most clients send first, then others that are widely sent."""
UNTOLD_AUDIO: Final = ("", "audio/*", "application/octet-stream")
"""Media types that do not say which kind of sound it is."""
SUBTYPES: Final = frozenset({"PCM_U8", "PCM_S8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"})
"""How samples are stored in the files that are decoded; others would open one more decoder."""
RATES: Final = (1000, 768_000)
"""Samples per second that a file may have, least and most."""
MOST_CHANNELS: Final = 32
BLOCK: Final = 2**16
"""Samples per channel that are decoded at a time: mixed at once, many channels take no more memory than one."""
_BEGINS: Final[dict[AudioFormat, re.Pattern[bytes]]] = {
    "wav": re.compile(rb"RIFF....WAVE", re.DOTALL),
    "flac": re.compile(rb"fLaC"),
}


class EncodedSound(NamedTuple):
    """A file as it was sent: what its sender says it is, its bytes, and where in the request it stands."""

    media_type: str
    content: bytes
    where: str

    def __str__(self) -> str:
        return f"{self.where} ({len(self.content)} bytes)"


@dataclass(frozen=True, slots=True)
class OpenedSound:
    """A sound whose length is known: of `frames` samples per channel at `rate` per second.

    `source` is an opened file of which nothing is decoded, or the samples themselves.
    """

    source: Any
    where: str
    frames: int
    rate: int
    channels: int = 1

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return self.frames / self.rate

    @property
    def work(self) -> int:
        """Samples that decoding goes over."""
        return self.frames * self.channels


def opened_sound(file: EncodedSound, names: Collection[AudioFormat]) -> OpenedSound:
    """The recording with its header read and no sample decoded.

    Raises:
        BadInput: it is not what its media type says, no sound at all, of none of the formats with these `names`, or of
            a kind that is not decoded.
    """
    import soundfile

    kind = _kind(file, names)
    try:
        found = soundfile.SoundFile(BytesIO(file.content))
    except Exception as error:  # the library's errors share no base class with those of a damaged stream
        raise BadInput(f"{file} cannot be read as {MEDIA_TYPES[kind][0]}: {_reason(error)}") from error
    if found.subtype not in SUBTYPES:
        kinds = ", ".join(sorted(SUBTYPES))
        raise BadInput(f"{file.where}: its samples are stored as {found.subtype}; decoded are {kinds}")
    if not RATES[0] <= found.samplerate <= RATES[1] or found.channels > MOST_CHANNELS:
        told = f"{found.samplerate} samples per second in {found.channels} channels"
        raise BadInput(f"{file.where} has {told}; taken are {RATES[0]} to {RATES[1]} in at most {MOST_CHANNELS}")
    if not 0 < found.frames < 2**40:
        raise BadInput(f"{file.where}: its header does not tell how long it is, or tells that it is empty")
    return OpenedSound(found, file.where, found.frames, found.samplerate, found.channels)


def mono_at(recording: OpenedSound, rate: int) -> Array:
    """The samples, float32 in -1..1: the mean of all channels, at `rate` per second.

    Raises:
        BadInput: it is damaged, or ends before its header says.
    """
    samples = recording.source if isinstance(recording.source, np.ndarray) else _decoded(recording)
    if not np.isfinite(samples).all():
        raise BadInput(f"{recording.where} holds samples that are no finite numbers")
    if recording.rate == rate:
        return samples
    import soxr

    return np.asarray(soxr.resample(samples, recording.rate, rate, quality="HQ"), np.float32)


def _decoded(recording: OpenedSound) -> Array:
    samples = np.empty(recording.frames, np.float32)
    read = 0
    try:
        while read < recording.frames:
            block = recording.source.read(min(BLOCK, recording.frames - read), dtype="float32", always_2d=True)
            if not len(block):
                break
            samples[read : read + len(block)] = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
            read += len(block)
    except Exception as error:
        raise BadInput(f"{recording.where} cannot be decoded: {_reason(error)}") from error
    if read < recording.frames:
        raise BadInput(f"{recording.where} is cut short: it has {read} of the {recording.frames} samples it announces")
    return samples


def require_libraries() -> None:
    """Raise `ConfigError` without the extra; nothing is imported."""
    if find_spec("soundfile") is None or find_spec("soxr") is None:
        raise ConfigError("base.audio: a model of sounds needs the extra 'audio': pip install 'leanserve[audio]'")


def audio_types(names: Collection[AudioFormat]) -> tuple[str, ...]:
    """The media types of these formats, one each."""
    return tuple(MEDIA_TYPES[name][0] for name in AUDIO_FORMATS if name in names)


def audio_format_of(media_type: str) -> AudioFormat | None:
    """The format that a media type names."""
    return next((name for name, known in MEDIA_TYPES.items() if media_type in known), None)


def _kind(file: EncodedSound, names: Collection[AudioFormat]) -> AudioFormat:
    told, taken = audio_format_of(file.media_type), ", ".join(audio_types(names))
    seen = next((name for name, begins in _BEGINS.items() if begins.match(file.content)), None)
    if told is None and file.media_type not in UNTOLD_AUDIO:
        raise BadInput(f"{file.where} is sent as {file.media_type}, which is none of {taken}")
    found = told or seen
    if found is None:
        raise BadInput(f"{file} begins like none of {taken}")
    if found not in names:
        raise BadInput(f"{file.where} is {MEDIA_TYPES[found][0]}, which is none of {taken}")
    if found != seen:
        begins = "does not begin like one" if seen is None else f"begins like {MEDIA_TYPES[seen][0]}"
        raise BadInput(f"{file} is sent as {file.media_type}, but {begins}")
    return found


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
