"""A package compiled once answers as the module does, whatever the number of rows. Compiling takes a minute: `soak`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.fx.experimental._config
from torch import nn

from hybrid_net import hybrid_base
from leanserve.contracts import ModelSpec, OnnxModel, Share, TensorSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.composition import find_violation
from leanserve.passes.families.precision.cast import Cast
from leanserve.passes.families.runtime.aot_inductor import AotInductor
from leanserve.passes.families.runtime.channels_last import ChannelsLast
from leanserve.passes.families.runtime.onnxruntime import OnnxRuntime
from leanserve.passes.toolkit.lowering import exported_program
from leanserve.runtime.backends.pytorch import TorchBackend
from leanserve.runtime.formats import format_named, open_backend
from leanserve.runtime.formats.aot_inductor import PackagedModel
from tiny_base import IMAGES, TinyNet, context_of, lively, tiny_base
from tiny_encoder import tiny_encoder_base

ROWS = (1, 2, 3, 8)


def packaged(model: TorchModel, folder: Path, **options: object) -> PackagedModel:
    """Built, saved, and loaded."""
    applied = AotInductor.model_validate(options).apply(model, context_of(tiny_base(), folder))
    assert applied.facts["speedup"] > 0
    assert isinstance(applied.model, PackagedModel)
    assert format_named("aot_inductor").size(applied.model).parameters > 0
    (folder / "artifact").mkdir()
    format_ = format_named("aot_inductor")
    format_.save(applied.model, folder / "artifact")
    found: PackagedModel = format_.load(folder / "artifact", model.spec, nn.Identity)
    return found


@pytest.mark.soak
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("freezing", ["on", "off"])
def test_convolutions_answer_at_any_number_of_rows(tmp_path: Path, freezing: str) -> None:
    model = TorchModel(lively(TinyNet(), seed=3), IMAGES)
    ours, theirs = open_backend(packaged(model, tmp_path, freezing=freezing), Share(1)), TorchBackend(model, 1)
    for rows in ROWS:
        batch = IMAGES.example(rows)
        assert ours.run(batch).outputs[0] == pytest.approx(theirs.run(batch).outputs[0], abs=1e-4)
    ours.close()


@pytest.mark.soak
@pytest.mark.usefixtures("one_thread")
def test_texts_answer_at_any_length_and_on_more_threads_than_it_was_built_with(tmp_path: Path) -> None:
    base = tiny_encoder_base()
    ours, theirs = open_backend(packaged(base.model(), tmp_path), Share(2)), TorchBackend(base.model(), 1)
    for rows, length in ((1, 1), (1, 7), (3, 12), (5, 2)):
        batch = base.spec.example(rows, length)
        assert ours.run(batch).outputs[0] == pytest.approx(theirs.run(batch).outputs[0], abs=1e-4)
    ours.close()


@pytest.mark.soak
@pytest.mark.usefixtures("one_thread")
def test_a_cast_model_is_compiled_with_its_conversions(tmp_path: Path) -> None:
    narrow = (
        Cast(keep=("head",))
        .apply(TorchModel(lively(TinyNet(), seed=3), IMAGES), context_of(tiny_base(), tmp_path))
        .model
    )
    assert isinstance(narrow, TorchModel)
    ours, theirs = open_backend(packaged(narrow, tmp_path), Share(1)), TorchBackend(narrow, 1)
    for rows in ROWS:
        batch = IMAGES.example(rows)
        assert ours.run(batch).outputs[0] == pytest.approx(theirs.run(batch).outputs[0], abs=0.1)


def test_kernels_stored_channels_last_are_exported_for_a_single_row_too(tmp_path: Path) -> None:
    base = hybrid_base()
    model = base.model()
    last = ChannelsLast().apply(model, context_of(base, tmp_path)).model
    assert isinstance(last, TorchModel)
    sizes: Any = torch.fx.experimental._config
    with sizes.patch(backed_size_oblivious=True):  # as packages are made
        program = exported_program(last).module()
    for rows in (1, 3):
        batch = [torch.from_numpy(array) for array in base.spec.example(rows)]
        assert program(*batch).detach().numpy() == pytest.approx(model.module(*batch).detach().numpy(), abs=1e-4)
    assert not all(weight.is_contiguous() for weight in last.module.parameters())


class Decides(nn.Module):
    """What it computes depends on its data."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values if values.sum() > 0 else -values


def test_what_cannot_be_packaged_is_refused(tmp_path: Path) -> None:
    context = context_of(tiny_base(), tmp_path)
    spec = ModelSpec((TensorSpec("values", "float32", (6,)),), (TensorSpec("out", "float32", (6,)),))
    with pytest.raises(PassFailed, match="cannot be exported as a program"):
        AotInductor().apply(TorchModel(Decides(), spec), context)
    with pytest.raises(PassFailed, match="drop the pass"):
        AotInductor().apply(OnnxModel(tmp_path / "model.onnx", IMAGES), context)
    missing = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with missing, pytest.raises(PassFailed, match=r"aot_inductor needs a C\+\+ compiler; install g\+\+"):
        AotInductor().apply(TorchModel(TinyNet(), IMAGES), context)


def test_it_is_the_only_runtime_and_asks_for_a_compiler_where_it_is_built() -> None:
    assert find_violation([AotInductor(), OnnxRuntime()]) is not None
    assert find_violation([Cast(), AotInductor()]) is None
    assert AotInductor().needs == {"building_compiler"}
