"""Models of timm: weights, preprocessing and labels as timm itself has them; offline throughout."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file

from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin, open_source
from leanserve.bases.sources.timm_model import TimmSource, imported_timm, preprocessing
from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.images import ImageCodec
from leanserve.config.base_section import ShippedBase, TimmBase
from leanserve.contracts import Array, Base, ModelSpec, TorchModel
from leanserve.errors import ConfigError

NAME = "test_resnet.r160_in1k"
SYNTHETIC: Any = {"synthetic": 8}


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no way out."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def save(path: Path, seed: int = 1, **options: Any) -> torch.nn.Module:
    """The weights of a little model of timm as a file; the model, in eval mode."""
    torch.manual_seed(seed)
    module: torch.nn.Module = imported_timm().create_model(NAME, **options).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(module.state_dict(), path)
    return module


def test_a_model_that_is_left_in_training_mode_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.safetensors")
    monkeypatch.setattr(torch.nn.Module, "eval", lambda self: self)
    with pytest.raises(ConfigError, match=r"depends on the other rows of its batch|another answer the second time"):
        opened(tmp_path)


def opened(folder: Path, weights: str = "a.safetensors", **more: Any) -> Base:
    base = TimmBase.model_validate({"timm": NAME, "weights": weights} | more)
    return open_base(Origin(base=base, data=SYNTHETIC, folder=folder, cache=folder / "cache"))


def photo(size: tuple[int, int]) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def run(module: torch.nn.Module, rows: Array) -> Array:
    with torch.inference_mode():
        return np.asarray(module(torch.from_numpy(rows)).numpy())


def test_answers_are_those_of_timm_itself(tmp_path: Path) -> None:
    module = save(tmp_path / "a.safetensors")
    base = opened(tmp_path)
    assert base.name == "test_resnet"
    assert base.spec.inputs[0].shape == (3, 160, 160)
    assert len(base.spec.labels) == 1000
    assert base.spec.labels[0] == "tench"
    assert base.caveats == ("synthetic data",)
    rows = base.spec.example(2)[0]
    np.testing.assert_array_equal(run(base.torch_module(), rows), run(module, rows))


# Both ways around, odd sizes, larger and smaller than the input: rounding is what differs between libraries.
@pytest.mark.parametrize("size", [(320, 240), (213, 319), (161, 160), (90, 70)])
@pytest.mark.parametrize("name", [NAME, "resnet50.a1_in1k", "convnext_base.fb_in22k_ft_in1k_384"])
def test_images_are_prepared_as_by_timm(size: tuple[int, int], name: str) -> None:
    """The pixels are the same, bit for bit; normalised, they differ in the last bits of float32 at most."""
    timm = imported_timm()
    config = timm.get_pretrained_cfg(name)
    prepare = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config.to_dict()))
    expected = prepare(photo(size)).numpy()
    codec = ImageCodec(answers=AnswerEncoder(ModelSpec((), ())), **preprocessing(name, config).model_dump())
    found = codec.decode("image/png", png(photo(size))).inputs[0][0]
    assert found.shape == expected.shape
    mean, std = (np.array(values)[:, None, None] for values in (config.mean, config.std))
    np.testing.assert_array_equal(*(np.rint((values * std + mean) * 255) for values in (found, expected)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_preprocessing_that_cannot_be_expressed_is_asked_for() -> None:
    timm = imported_timm()
    config = timm.get_pretrained_cfg("volo_d5_512.sail_in1k")
    with pytest.raises(ConfigError, match=r"base.image: timm prepares images for volo_d5_512.*crop 1.15"):
        preprocessing("volo_d5_512.sail_in1k", config)


def test_the_classifier_in_the_file_decides_the_classes(tmp_path: Path) -> None:
    module = save(tmp_path / "a.safetensors", num_classes=3)
    base = opened(tmp_path)
    assert base.spec.labels == ("class 0", "class 1", "class 2")
    rows = base.spec.example(2)[0]
    np.testing.assert_array_equal(run(base.torch_module(), rows), run(module, rows))
    assert opened(tmp_path, labels=("a", "b", "c"), name="abc").spec.labels == ("a", "b", "c")
    with pytest.raises(ConfigError, match=r"base.labels: 2 labels, and no output has 2 numbers per row"):
        opened(tmp_path, labels=("a", "b"))


def test_a_single_number_is_no_class_and_several_need_not_be_any(tmp_path: Path) -> None:
    module = save(tmp_path / "a.safetensors", num_classes=1)
    base = opened(tmp_path)
    assert (base.spec.labels, base.spec.outputs[0].name, base.spec.outputs[0].meaning) == ((), "output", "values")
    rows = base.spec.example(2)[0]
    np.testing.assert_array_equal(run(base.torch_module(), rows), run(module, rows))
    save(tmp_path / "a.safetensors", num_classes=3)
    regression = opened(tmp_path, outputs={"angles": "values"})
    assert (regression.spec.labels, regression.spec.outputs[0].name) == ((), "angles")
    assert run(regression.torch_module(), rows).shape == (2, 3)


def test_weights_without_a_classifier_give_features(tmp_path: Path) -> None:
    module = save(tmp_path / "a.safetensors", num_classes=0)
    base = opened(tmp_path)
    assert base.spec.labels == ()
    assert base.spec.outputs[0].name == "embedding"
    rows = base.spec.example(2)[0]
    np.testing.assert_array_equal(run(base.torch_module(), rows), run(module, rows))


def test_orientation_alone_leaves_the_preprocessing_of_timm(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors")
    stored, turned = (opened(tmp_path, image=image).codec for image in (None, {"orientation": "exif"}))
    assert isinstance(stored, ImageCodec)
    assert turned == replace(stored, orientation="exif")
    assert stored.fit == "crop"


def test_own_preprocessing_and_grey_images(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", num_classes=2, in_chans=1)
    image = {"mode": "L", "size": (64, 48), "mean": (0.5,), "std": (0.5,)}
    base = opened(tmp_path, image=image)
    assert base.spec.inputs[0].shape == (1, 48, 64)
    assert run(base.torch_module(), base.spec.example(2)[0]).shape == (2, 2)


def test_a_transformer_of_another_input_size(tmp_path: Path) -> None:
    module = imported_timm().create_model("test_vit.r160_in1k", img_size=(64, 96), num_classes=2).eval()
    save_file(module.state_dict(), tmp_path / "vit.safetensors")
    image = {"size": (96, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    base = opened(tmp_path, "vit.safetensors", timm="test_vit.r160_in1k", image=image)
    rows = base.spec.example(2)[0]
    np.testing.assert_array_equal(run(base.torch_module(), rows), run(module, rows))


def test_checkpoints_of_its_training_script(tmp_path: Path) -> None:
    """State dict and average, the arguments, a metric of numpy, names as in DataParallel."""
    plain, average = (save(tmp_path / "a.safetensors", seed, num_classes=3) for seed in (1, 2))
    saved = {"epoch": 3, "arch": NAME, "version": 2, "args": Namespace(lr=0.1), "metric": np.float64(71.2)}
    saved["state_dict"] = {f"module.{name}": tensor for name, tensor in plain.state_dict().items()}
    torch.save(saved | {"state_dict_ema": average.state_dict()}, tmp_path / "model_best.pth.tar")
    base = opened(tmp_path, "model_best.pth.tar")
    assert base.caveats[0] == "weights are state_dict_ema, not state_dict (base.weights_key)"
    assert base.spec.labels == ("class 0", "class 1", "class 2")
    rows = base.spec.example(2)[0]
    np.testing.assert_array_equal(run(base.torch_module(), rows), run(average, rows))
    chosen = opened(tmp_path, "model_best.pth.tar", weights_key="state_dict")
    assert chosen.caveats == ("synthetic data",)
    np.testing.assert_array_equal(run(chosen.torch_module(), rows), run(plain, rows))
    assert chosen.digest != base.digest
    with pytest.raises(ValidationError, match="weights_key chooses among the weights of a file"):
        opened(tmp_path, "hub", weights_key="state_dict")


def test_random_weights_are_the_same_everywhere_and_marked(tmp_path: Path) -> None:
    base = opened(tmp_path, "random")
    assert base.caveats == ("untrained", "synthetic data")
    rows = base.spec.example(1)[0]
    state = torch.random.get_rng_state()
    np.testing.assert_array_equal(run(base.torch_module(), rows), run(base.torch_module(), rows))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_weights_of_the_hub_come_from_the_cache(tmp_path: Path, hub: Path) -> None:
    root = hub / f"models--timm--{NAME}"
    module = save(root / "snapshots" / "abc" / "model.safetensors")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    base = opened(tmp_path, "hub")
    rows = base.spec.example(1)[0]
    np.testing.assert_array_equal(run(base.torch_module(), rows), run(module, rows))


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown model": ({"timm": "test_resnett", "weights": "random"}, r"'test_resnett'; did you mean .*_resnet"),
    "unknown tag": ({"timm": "test_resnet.best", "weights": "random"}, r"tag \(best\).* There are: test_resnet.r160"),
    "hub without tag": ({"timm": "resnet50"}, r"the name says which. There are: resnet50.a1_in1k, resnet50.a1h_in1k"),
    "nothing on the hub": ({"timm": "gcvit_base.in1k"}, r"base.weights: timm has no weights for 'gcvit_base.in1k'"),
    "not downloaded": ({"timm": NAME}, rf"base.weights: the file model.safetensors of 'timm/{NAME}' is not in"),
    "no file": ({"timm": NAME, "weights": "b.pt"}, r"cannot read .*b.pt"),
    "odd name": ({"timm": "a b/../c"}, r"has no model 'a b/../c'"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(case: str, tmp_path: Path) -> None:
    declared, reason = MISTAKES[case]
    with pytest.raises(ConfigError, match=reason):
        open_base(Origin(base=TimmBase.model_validate(declared), data=SYNTHETIC, folder=tmp_path))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    module = imported_timm().create_model("test_vit", num_classes=2)
    save_file(module.state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=r"base.weights: .*a.safetensors does not fit the model: lacks conv1"):
        opened(tmp_path)


def test_the_fingerprint_follows_name_and_weights(tmp_path: Path) -> None:
    def fingerprint(**declared: Any) -> str:
        return TimmSource(
            TimmBase.model_validate({"timm": NAME, "weights": "a.safetensors"} | declared), tmp_path
        ).fingerprint()

    save(tmp_path / "a.safetensors")
    found = [fingerprint(), fingerprint(weights="random"), fingerprint(timm="test_resnet")]
    save(tmp_path / "a.safetensors", seed=2)
    found.append(fingerprint())
    assert len(set(found)) == 4
    assert found[3] == fingerprint()


def test_a_second_opening_imports_no_heavy_library(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", num_classes=2)
    first = opened(tmp_path)
    program = (
        "import sys; from leanserve.bases.opening import reopen_base; base = reopen_base(sys.argv[1]);"
        "print(base.digest, *{'torch', 'torchvision', 'timm', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, first.origin], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [first.digest]


def test_resnet50_asks_where_its_weights_come_from(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"base.weights: .*'resnet50' comes without weights.* hub .* a file, or random"
    ):
        open_base(Origin(base=ShippedBase(shipped="resnet50")))
    with pytest.raises(ConfigError, match=r"data: this base comes without rows"):
        open_base(Origin(base=ShippedBase(shipped="resnet50", weights="random"), cache=tmp_path))
    origin = Origin(base=ShippedBase(shipped="resnet50", weights="random"), data=SYNTHETIC, cache=tmp_path)
    base = open_base(origin)
    assert base.name == "resnet50"
    assert base.caveats == ("untrained", "synthetic data")
    assert base.spec.inputs[0].shape == (3, 224, 224)
    source = open_source(origin.base, tmp_path)
    assert isinstance(source, TimmSource)
    model = source.model(base.spec)
    assert isinstance(model, TorchModel)
    assert sum(parameter.numel() for parameter in model.module.parameters()) == 25_557_032
