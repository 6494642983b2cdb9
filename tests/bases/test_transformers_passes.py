"""Brought models of transformers go through the passes that matter most for them, and answer (nearly) the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from leanserve.bases.loaded import LoadedBase
from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.codecs.text import TextCodec
from leanserve.contracts import Array, Model, Share, TensorSpec, TorchModel
from leanserve.evaluation.fidelity import fidelity
from leanserve.passes.base import Pass
from leanserve.passes.families.quantize.quantize_dynamic import QuantizeDynamic
from leanserve.passes.families.runtime.onnxruntime import OnnxRuntime
from leanserve.runtime.formats import open_backend
from leanserve.runtime.formats.torch_size import count_macs
from tiny_base import context_of
from tiny_checkpoints import WORDS, write_classifier, write_encoder


@pytest.fixture(scope="module", params=["embedding", "classification"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    """A brought model with 23 sentences of different length."""
    folder = tmp_path_factory.mktemp("brought")
    (write_encoder if request.param == "embedding" else write_classifier)(folder / "model")
    lines = [" ".join([*WORDS[: 2 + index % 7], word]) for index, word in enumerate(WORDS)]
    (folder / "texts.tsv").write_text("\n".join(lines))
    origin = {"base": {"transformers": "model"}, "data": {"texts": {"gate": "texts.tsv"}}, "folder": folder}
    return open_base(Origin.model_validate(origin))


@pytest.fixture(scope="module")
def exported(base: LoadedBase, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return applied(OnnxRuntime(), base.model(), base, tmp_path_factory.mktemp("exported"))


def applied(pass_: Pass, model: Model, base: LoadedBase, folder: Path) -> Model:
    return pass_.apply(model, context_of(base, folder)).model


def answers(model: Model, base: LoadedBase) -> Array:
    """Of the gate split in batches of 8, each padded to its own longest text."""
    backend = open_backend(model, Share(1))
    try:
        return np.concatenate([backend.run(batch.inputs).outputs[0] for batch in base.data("gate").batches(8)])
    finally:
        backend.close()


def test_exported_it_answers_the_same_at_any_length(base: LoadedBase, exported: Model) -> None:
    expected, found = answers(base.model(), base), answers(exported, base)
    assert expected.std(axis=0).min() > 1e-3, "texts must differ for the comparison to mean anything"
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_in_int8_it_answers_nearly_the_same(base: LoadedBase, exported: Model, tmp_path: Path) -> None:
    model = applied(QuantizeDynamic(), exported, base, tmp_path)
    direction = (TensorSpec("answers", "float32", base.spec.outputs[0].shape, meaning="embedding"),)
    [near] = fidelity((answers(model, base),), (answers(base.model(), base),), direction)
    assert 0.99 < near.agreement < 1 - 1e-9, "close, and not the float model"


def test_padding_and_company_change_nothing(base: LoadedBase) -> None:
    assert isinstance(base.codec, TextCodec)
    short, long = base.codec.tokens(["the cat", " ".join(WORDS)])
    module = base.torch_module()
    with torch.inference_mode():
        alone, together = (module(*map(torch.from_numpy, base.codec.arrays(rows))) for rows in ([short], [short, long]))
    np.testing.assert_allclose(together[0], alone[0], atol=1e-5)


def test_its_arithmetic_is_counted(base: LoadedBase) -> None:
    model = base.model()
    assert isinstance(model, TorchModel)
    linear = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert count_macs(model) >= 16 * linear, "16 tokens per row"
