"""Models of sounds, brought as ONNX and as torch modules: the codec that they get, and their answers over HTTP."""

from __future__ import annotations

import threading
import wave
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fakes import PixelBackend, planned, serving
from leanserve.bases.loaded import LoadedBase
from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.codecs.audio import AudioCodec
from leanserve.config.schema import ServiceConfig
from leanserve.contracts import Arrays, Result
from leanserve.errors import ConfigError
from leanserve.runtime.device import Device

MODULE = """
from torch import nn
class Envelope(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 400, stride=160)
    def forward(self, samples):
        return self.conv(samples[:, None]).abs().amax(dim=2)
def envelope():
    return Envelope()
"""


def loudest(path: Path, *shape: Any) -> Path:
    """A graph that gives the largest sample of each row."""
    node = helper.make_node("ReduceMax", ["wave"], ["peak"], axes=list(range(1, len(shape) + 1)), keepdims=0)
    inputs = [helper.make_tensor_value_info("wave", TensorProto.FLOAT, ["n", *shape])]
    outputs = [helper.make_tensor_value_info("peak", TensorProto.FLOAT, ["n"])]
    graph = helper.make_graph([node], "loudest", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def opened(folder: Path, **base: Any) -> LoadedBase:
    return open_base(Origin.model_validate({"base": base, "data": {"synthetic": 8}, "folder": folder}))


def wav(samples: Any, rate: int = 16_000) -> bytes:
    stream = BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.asarray(samples) * 32767).astype("<i2").tobytes())
    return stream.getvalue()


@pytest.mark.parametrize(
    ("shape", "layout"), [((400,), "plain"), ((1, 400), "channel_first"), ((400, 1), "channel_last")]
)
def test_an_onnx_file_takes_frames(tmp_path: Path, shape: tuple[int, ...], layout: str) -> None:
    loudest(tmp_path / "m.onnx", *shape)
    base = opened(tmp_path, onnx="m.onnx", audio={"rate": 16_000, "samples": 400, "hop": 200, "layout": layout})
    assert isinstance(base.codec, AudioCodec)
    assert base.spec.inputs[0].shape == shape
    decoded = base.codec.decode("audio/wav", wav(np.linspace(0, 1, 1000)))
    assert decoded.inputs[0].shape == (4, *shape)


def test_a_shape_that_is_not_the_graphs_is_refused(tmp_path: Path) -> None:
    loudest(tmp_path / "m.onnx", 400)
    with pytest.raises(ConfigError, match=r"wave|400"):
        opened(tmp_path, onnx="m.onnx", audio={"rate": 16_000, "samples": 512})


def test_any_length_from_a_least_one_on(tmp_path: Path) -> None:
    (tmp_path / "sound_of_test.py").write_text(MODULE)
    audio = {"rate": 16_000, "samples": None, "least_samples": 400, "max_seconds": 2}
    base = opened(tmp_path, python="sound_of_test:envelope", audio=audio, rows="one_length")
    assert (base.spec.least, base.spec.max_length, base.spec.outputs[0].shape) == (400, 32_000, (4,))
    assert base.codec.decode("audio/wav", wav(np.zeros(10))).inputs[0].shape == (1, 400)


class Loudest(PixelBackend):
    def run(self, batch: Arrays) -> Result:
        return Result((batch[0].max(axis=1),))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("sound")
    loudest(folder / "m.onnx", 1600)
    base = opened(folder, onnx="m.onnx", audio={"rate": 16_000, "samples": 1600})
    config = ServiceConfig.model_validate({"base": "x", "variants": [{"name": "a"}]})
    fleet = planned(config, base, Device("cpu", 1))
    fleet.warm.open("a", lambda threads: Loudest())
    with serving(fleet, threading.Event()) as live:
        yield f"http://{live.http}"


def test_a_recording_is_answered_frame_by_frame(host: str) -> None:
    tone = np.concatenate([np.full(1600, 0.25), np.full(1600, 0.5), np.full(800, 0.75)])
    reply = httpx.post(f"{host}/v1/predict", content=wav(tone), headers={"content-type": "audio/wav"}).json()
    told = [(row["start_s"], row["end_s"], round(row["outputs"]["peak"], 2)) for row in reply["predictions"]]
    assert told == [(0.0, 0.1, 0.25), (0.1, 0.2, 0.5), (0.2, 0.25, 0.75)]
    form = httpx.post(f"{host}/v1/predict", files={"f": ("a.wav", wav(tone[:1600]), "audio/x-wav")}).json()
    assert (form["file"], form["start_s"], form["end_s"]) == (0, 0.0, 0.1)


def test_the_description_names_the_media_types(host: str) -> None:
    document = httpx.get(f"{host}/openapi.json").json()
    content = document["paths"]["/v1/predict"]["post"]["requestBody"]["content"]
    assert {"audio/wav", "audio/flac", "audio/*", "multipart/form-data", "application/json"} <= set(content)
