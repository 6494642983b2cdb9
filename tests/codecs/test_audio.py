"""Recordings in: held against the standard library's wave, scipy and what was written; bounds and refusals."""

from __future__ import annotations

import base64
import json
import wave
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from pydantic import ValidationError

from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.audio import AudioCodec
from leanserve.config.base_section import AudioInput
from leanserve.contracts import Array, ModelSpec, Span, TensorSpec
from leanserve.errors import BadInput, BodyTooLarge, ConfigError, UnsupportedMediaType

RATE = 16_000
RANDOM = np.random.default_rng(0)


def codec(
    *shape: int | None, rate: int = RATE, max_length: int = 60 * RATE, least: int = 1, **options: Any
) -> AudioCodec:
    spec = ModelSpec((TensorSpec("audio", "float32", shape),), (), max_length=max_length, least=least)
    return AudioCodec(rate, AnswerEncoder(spec), **options)


def pcm(samples: int, channels: int = 1) -> Array:
    return RANDOM.integers(-30_000, 30_000, (samples, channels), dtype=np.int16)


def wav(samples: Array, rate: int = RATE) -> bytes:
    """Written by Python's own library."""
    stream = BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return stream.getvalue()


def encoded(samples: Array, form: str, subtype: str | None = None, rate: int = RATE) -> bytes:
    stream = BytesIO()
    soundfile.write(stream, samples, rate, format=form, subtype=subtype)
    return stream.getvalue()


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_a_wav_is_the_mean_of_its_channels(channels: int) -> None:
    samples = pcm(100_000, channels)
    found = codec(None).decode("audio/wav", wav(samples)).inputs[0]
    np.testing.assert_allclose(found, [samples.mean(axis=1) / 32768], rtol=0, atol=1e-6)


def test_a_flac_is_what_was_written() -> None:
    samples = pcm(70_000)
    found = codec(None).decode("audio/flac", encoded(samples, "FLAC")).inputs[0]
    np.testing.assert_array_equal(found, samples.T.astype(np.float32) / 32768)


@pytest.mark.parametrize(
    ("form", "subtype", "tolerance"),
    [
        *(("WAV", "PCM_U8", 1 / 128), ("WAV", "PCM_24", 1e-6), ("WAV", "PCM_32", 1e-7), ("WAV", "FLOAT", 0)),
        *(("WAV", "DOUBLE", 1e-7), ("WAV", "ULAW", 0.04), ("WAV", "ALAW", 0.04), ("WAVEX", "PCM_16", 1 / 32768)),
        *(("FLAC", "PCM_24", 1e-6), ("FLAC", "PCM_S8", 1 / 128)),
    ],
)
def test_samples_may_be_stored_in_many_ways(form: str, subtype: str, tolerance: float) -> None:
    samples = (RANDOM.random(3000, np.float32) * 1.8 - 0.9).astype(np.float32)
    found = codec(None).decode("", encoded(samples, form, subtype)).inputs[0][0]
    np.testing.assert_allclose(found, samples, rtol=0, atol=tolerance)


def tones_at(times: Array) -> Array:
    return np.asarray(np.mean([np.sin(2 * np.pi * hertz * times + hertz) for hertz in (100, 440, 1234, 3000)], axis=0))


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_is_that_of_scipy_but_at_the_ends(rate: int) -> None:
    from scipy.signal import firwin, resample_poly

    times = np.arange(rate) / rate
    tones = tones_at(times)
    found = codec(None).decode("audio/wav", encoded(tones, "WAV", "FLOAT", rate)).inputs[0][0]
    common = np.gcd(rate, RATE)
    up, down = RATE // common, rate // common
    wanted = resample_poly(tones, up, down, window=firwin(200 * max(up, down) + 1, 0.95 / max(up, down)))
    assert len(found) == len(wanted) == RATE
    np.testing.assert_allclose(found[1000:-1000], wanted[1000:-1000], rtol=0, atol=2e-3)
    exact = tones_at(np.arange(RATE) / RATE)
    np.testing.assert_allclose(found[1000:-1000], exact[1000:-1000], rtol=0, atol=1e-4)


def test_what_the_lower_rate_cannot_hold_is_gone() -> None:
    times = np.arange(48_000) / 48_000
    found = codec(None).decode("audio/wav", encoded(np.sin(2 * np.pi * 12_000 * times), "WAV", "FLOAT", 48_000))
    assert np.abs(found.inputs[0][0, 1000:-1000]).max() < 1e-3


@pytest.mark.parametrize(
    ("samples", "frame", "hop", "starts"),
    [
        (10, 4, None, [0, 4, 8]),
        (8, 4, None, [0, 4]),
        (9, 4, 2, [0, 2, 4, 6]),
        (8, 4, 2, [0, 2, 4]),
        (3, 4, 2, [0]),
        (10, 4, 7, [0, 7]),
    ],
)
def test_frames_reach_the_end_and_the_last_is_filled_up(samples: int, frame: int, hop: int | None, starts: Any) -> None:
    content = pcm(samples)
    decoded = codec(frame, hop=hop).decode("audio/wav", wav(content))
    signal = np.concatenate([content[:, 0] / 32768, np.zeros(20)])
    np.testing.assert_allclose(decoded.inputs[0], [signal[start : start + frame] for start in starts], atol=1e-7)
    assert decoded.many == (len(starts) > 1)
    assert decoded.tells_places
    assert decoded.places == tuple(
        Span(0, round(start / RATE, 6), round(min(start + frame, samples) / RATE, 6)) for start in starts
    )


@pytest.mark.parametrize(("shape", "wanted"), [((1, 4), (3, 1, 4)), ((4, 1), (3, 4, 1)), ((1, None), (1, 1, 10))])
def test_the_axis_of_channels_is_where_the_model_has_it(shape: Any, wanted: Any) -> None:
    assert codec(*shape).decode("audio/wav", wav(pcm(10))).inputs[0].shape == wanted


def test_several_files_are_rows_in_their_order_filled_up_to_the_longest() -> None:
    one, two = pcm(30), pcm(50)
    files: Any = [("a", ("1.wav", wav(one))), ("b", ("2.flac", encoded(two, "FLAC"), "audio/flac"))]
    form = httpx.Request("POST", "http://x/", files=files)
    decoded = codec(None).decode(form.headers["content-type"], form.read())
    assert (decoded.inputs[0].shape, decoded.lengths, decoded.many) == ((2, 50), (30, 50), True)
    assert not decoded.inputs[0][0, 30:].any()
    assert [place.file for place in decoded.places if isinstance(place, Span)] == [0, 1]
    told = [{"b64": base64.b64encode(content).decode()} for content in (wav(one), encoded(two, "FLAC"))]
    same = codec(None).decode("application/json", json.dumps({"inputs": told}).encode())
    np.testing.assert_array_equal(same.inputs[0], decoded.inputs[0])


def test_samples_may_come_as_numbers() -> None:
    decoded = codec(None).decode("application/json", b'{"inputs": [0.5, -0.25, 1]}')
    assert (decoded.inputs[0].tolist(), decoded.many) == ([[0.5, -0.25, 1.0]], False)
    assert codec(None).decode("application/json", b'{"inputs": [[0.5], [1, 0]]}').inputs[0].shape == (2, 2)


def test_a_recording_that_is_too_short_is_filled_up() -> None:
    assert codec(None, least=400).decode("audio/wav", wav(pcm(10))).inputs[0].shape == (1, 400)


def an_hour() -> bytes:
    """Of silence: a few kilobytes."""
    stream = BytesIO()
    with soundfile.SoundFile(stream, "w", 8000, 1, format="FLAC") as file:
        for _ in range(60):
            file.write(np.zeros(60 * 8000, np.int16))
    return stream.getvalue()


def huge_header(frames: int, rate: int = RATE, channels: int = 1) -> bytes:
    """A WAV that announces more than it has."""
    content = bytearray(wav(pcm(8, channels), rate))
    content[40:44] = (2 * frames * channels).to_bytes(4, "little")
    content[4:8] = (2 * frames * channels + 36).to_bytes(4, "little")
    return bytes(content)


def test_an_hour_is_refused_before_a_sample_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    content = an_hour()
    monkeypatch.setattr("leanserve.codecs.audio.mono_at", lambda *_: pytest.fail("decoded"))
    assert len(content) < 500_000
    for taken in (codec(1000), codec(None, max_length=RATE * 7200)):
        with pytest.raises(BodyTooLarge, match=r"the recording has 3600.0 s; at most 600 s are taken"):
            taken.decode("audio/flac", content)
    with pytest.raises(BodyTooLarge, match=r"lasts 3600.0 s; the model takes at most 60 s"):
        codec(None).decode("audio/flac", content)
    with pytest.raises(BodyTooLarge, match=r"57600000 samples of the model's rows; at most 16777216"):
        codec(1000, max_seconds=7200).decode("audio/flac", content)


def test_many_overlapping_frames_and_one_long_among_short_ones_are_bounded() -> None:
    with pytest.raises(BodyTooLarge, match="samples of the model's rows"):
        codec(16_000, hop=1).decode("audio/wav", wav(pcm(2 * RATE)))
    short, long = wav(pcm(1)), encoded(np.zeros(59 * RATE), "FLAC")
    form = httpx.Request("POST", "http://x/", files=[("f", ("x", long)), *[("f", ("x", short))] * 20])
    with pytest.raises(BodyTooLarge, match="18 recordings have together"):
        codec(None).decode(form.headers["content-type"], form.read())


@pytest.mark.parametrize(
    ("media_type", "body", "said"),
    [
        ("audio/wav", b"RIFF", "is sent as audio/wav, but does not begin like one"),
        ("audio/wav", encoded(pcm(9), "FLAC"), "but begins like audio/flac"),
        ("audio/*", b"OggS" + bytes(50), "begins like none of audio/wav, audio/flac"),
        ("", b"", r"the body \(0 bytes\) begins like none"),
        ("audio/wav", b"RIFF\x24\0\0\0WAVEfmt " + bytes(20), "cannot be read as audio/wav"),
        ("audio/flac", encoded(pcm(90_000), "FLAC")[:-9000], "cut short|cannot be decoded"),
        ("audio/wav", wav(pcm(0)), "tells that it is empty"),
        ("audio/wav", wav(pcm(10), 10), "10 samples per second in 1 channels; taken are 1000 to 768000"),
        ("audio/wav", wav(pcm(10, 64)), "in 64 channels"),
        ("audio/wav", encoded(pcm(4000), "WAV", "IMA_ADPCM"), "stored as IMA_ADPCM; decoded are ALAW"),
        ("audio/wav", encoded(np.array([0, np.nan]), "WAV", "FLOAT"), "no finite numbers"),
        ("application/json", b'{"inputs": [1, "a"]}', "expected a file"),
        ("application/json", b'{"inputs": []}', "expected a file"),
        ("application/json", b'{"inputs": {"b64": "AAAA"}}', "begins like none"),
    ],
    ids=lambda value: "body" if isinstance(value, bytes) else None,  # some hold the time
)
def test_what_is_no_recording_is_refused_with_the_reason(media_type: str, body: bytes, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        codec(None).decode(media_type, body)


def test_what_a_header_announces_is_not_believed() -> None:
    """As of recorders that write the length at the end: what is there counts."""
    assert codec(None).decode("audio/wav", huge_header(2**30)).inputs[0].shape == (1, 8)
    assert codec(None).decode("audio/wav", huge_header(2**30, 768_000)).inputs[0].shape == (1, 1)


def test_formats_can_be_switched_off_and_others_are_named() -> None:
    with pytest.raises(UnsupportedMediaType, match=r"audio/ogg.*is none of audio/wav, audio/flac"):
        codec(None).decode("audio/ogg", b"")
    with pytest.raises(UnsupportedMediaType):
        codec(None, formats=("wav",)).decode("audio/flac", encoded(pcm(9), "FLAC"))
    with pytest.raises(BadInput, match="is audio/flac, which is none of audio/wav"):
        codec(None, formats=("wav",)).decode("", encoded(pcm(9), "FLAC"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"samples": None, "hop": 5}, "hop has no effect without samples"),
        ({"samples": 5, "least_samples": 5}, "least_samples has no effect beside samples"),
        ({}, "samples"),
    ],
)
def test_keys_without_effect_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        AudioInput.model_validate({"rate": 16_000} | options)


def test_the_cost_is_told_before_a_sample_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(np.zeros((48_000 * 50, 2), np.int16), "FLAC", rate=48_000)
    monkeypatch.setattr("leanserve.codecs.audio.mono_at", lambda *_: pytest.fail("decoded"))
    weighed = codec(None).prepare("audio/flac", content)
    assert 0.03 < weighed.seconds < 0.2
    assert codec(None).prepare("audio/wav", wav(pcm(1600))).seconds < 0.001


def test_without_the_extra_a_base_of_sounds_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanserve.codecs.audio_files.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"leanserve\[audio\]"):
        codec(None)
