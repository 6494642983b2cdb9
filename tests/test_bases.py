"""The bridge from a module in `models/` to the `Base` that the service knows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module, invalidate_caches, metadata
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from leanserve.bases.description import Description, Tensor
from leanserve.bases.opening import codec_of, open_base
from leanserve.bases.origin import Origin
from leanserve.bases.shipped import BaseModule, ModuleSource
from leanserve.config.base_section import TextInput
from leanserve.contracts import Base, TensorSpec
from leanserve.errors import ConfigError
from text_fleet import tokenizer_file

SOURCE = """
INPUTS = ({"name": "image", "dtype": "float32", "shape": (3, 2, 4)},)
OUTPUTS = ({"name": "logits", "dtype": "float32", "shape": (2,)},)
LABELS = ("cat", "dog")
IMAGE = {"mode": "RGB", "size": (4, 2), "resize": "nearest", "mean": (0, 0, 0), "std": (1, 1, 1)}
FILES = ("weights.bin",)
LIBRARIES = ("numpy",)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a base module `little` and its weights file."""
    (tmp_path / "little.py").write_text(SOURCE)
    (tmp_path / "weights.bin").write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    invalidate_caches()
    yield tmp_path
    sys.modules.pop("little", None)


def digest(folder: Path) -> str:
    return ModuleSource("little", cast(BaseModule, import_module("little"))).fingerprint()


def test_digits_keeps_the_contract() -> None:
    base: Base = open_base(Origin.shipped("digits"))
    assert base.name == "digits"
    assert base.spec.inputs == (TensorSpec("image", "float32", (1, 32, 32)),)
    assert base.spec.outputs == (TensorSpec("logits", "float32", (10,), meaning="logits"),)
    assert base.spec.labels == tuple("0123456789")
    data = base.data("gate", 5)
    batch = next(data.batches(3))
    assert len(data) == 5
    assert batch.labels is not None
    with torch.inference_mode():
        outputs = (base.torch_module()(torch.from_numpy(batch.inputs[0])).numpy(),)
    assert outputs[0].shape == (3, 10)
    assert base.score(outputs, outputs[0].argmax(axis=1)) == 1.0
    answers = base.codec.encode(outputs)
    assert [answer["label"] for answer in answers] == [str(best) for best in outputs[0].argmax(axis=1)]


def test_a_module_becomes_a_base(folder: Path) -> None:
    description = ModuleSource("little", cast(BaseModule, import_module("little"))).describe()
    codec = codec_of(description, description.spec())
    decoded = codec.decode("application/json", b'{"inputs": [[[255, 0, 0]]]}')
    assert decoded.inputs[0].shape == (1, *description.spec().inputs[0].shape)
    np.testing.assert_array_equal(decoded.inputs[0][0, :, 0, 0], [1, 0, 0])


def test_a_codec_for_a_changed_spec_makes_what_that_takes() -> None:
    base = open_base(Origin.shipped("digits"))
    assert base.codec_for(base.spec) is base.codec
    (image,) = base.spec.inputs
    smaller = replace(base.spec, inputs=(replace(image, shape=(1, 16, 24)),))
    decoded = base.codec_for(smaller).decode("application/json", json.dumps({"inputs": [[0] * 40] * 30}).encode())
    assert decoded.inputs[0].shape == (1, 1, 16, 24)
    relabelled = replace(base.spec, labels=tuple("abcdefghij"))
    outputs = (np.eye(10, dtype=np.float32)[[3]],)
    assert base.codec_for(relabelled).encode(outputs)[0]["label"] == "d"


def test_a_codec_for_fewer_tokens_cuts_texts_to_them(tmp_path: Path) -> None:
    text = TextInput(tokenizer=tokenizer_file(tmp_path), max_length=8)
    ids = Tensor(name="input_ids", dtype="int64", shape=(None,))
    outputs = (Tensor(name="embedding", dtype="float32", shape=(4,), meaning="embedding"),)
    description = Description(name="words", inputs=(ids,), outputs=outputs, text=text, max_length=8)
    whole = codec_of(description, description.spec())
    cut = codec_of(description, replace(description.spec(), max_length=5))
    sent = json.dumps({"inputs": "one two three four five"}).encode()
    assert whole.decode("application/json", sent).inputs[0].shape[1] == 7
    assert cut.decode("application/json", sent).inputs[0].shape[1] == 5


def test_an_unknown_base_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match=r"unknown base 'digit': the shipped bases are digits"):
        open_base(Origin.shipped("digit"))


def test_the_digest_follows_source_files_and_library_versions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = [digest(folder), digest(folder)]
    (folder / "weights.bin").write_bytes(b"weightt")
    digests.append(digest(folder))
    (folder / "little.py").write_text(SOURCE + "# a comment\n")
    digests.append(digest(folder))
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.0")
    digests.append(digest(folder))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4
    assert all(len(value) == 64 for value in digests)


def test_loading_a_base_and_its_digest_import_no_heavy_library() -> None:
    program = (
        "import sys; from leanserve.bases.opening import Origin, open_base;"
        "base = open_base(Origin.shipped('digits')); base.digest; base.codec;"
        "print(*{'torch', 'sklearn', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
