"""Image classifiers of transformers: logits and pixels are the library's own, and guesses are not made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.bases.sources.python_imports import make_torchvision_importable
from leanserve.bases.sources.transformers_images import preprocessor_input
from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.images import ImageCodec
from leanserve.contracts import ModelSpec, TensorSpec
from leanserve.errors import ConfigError

SIDE = 24
VIT = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": SIDE, "width": SIDE},
    "resample": 2,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7],
    "rescale_factor": 1 / 255,
}
CLIP = VIT | {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 30},
    "do_center_crop": True,
    "crop_size": {"height": SIDE, "width": SIDE},
    "resample": 3,
}
CONVNEXT = VIT | {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": SIDE}, "crop_pct": 0.8}


def photo(width: int, height: int) -> Image.Image:
    """Smooth, so that filters matter and single pixels do not."""
    small = np.random.default_rng(0).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def test_a_classifier_of_images(tmp_path: Path) -> None:
    make_torchvision_importable()
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    labels = dict(enumerate(("cat", "dog", "cow")))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    library = ViTForImageClassification(ViTConfig(image_size=SIDE, patch_size=8, id2label=labels, **shape)).eval()
    library.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(VIT))
    origin = {"base": {"transformers": "vit"}, "data": {"synthetic": 8}, "folder": tmp_path}
    base = open_base(Origin.model_validate(origin))
    assert base.spec.inputs == (TensorSpec("image", "float32", (3, SIDE, SIDE)),)
    assert base.spec.labels == ("cat", "dog", "cow")
    turned = {"base": {"transformers": "vit", "image": {"orientation": "exif"}}}
    assert open_base(Origin.model_validate(origin | turned)).codec == replace(base.codec, orientation="exif")  # type: ignore[type-var]
    assert isinstance(base.codec, ImageCodec)
    pixels = torch.from_numpy(base.codec.row(photo(40, 50))[None])
    with torch.inference_mode():
        np.testing.assert_allclose(base.torch_module()(pixels), library(pixel_values=pixels).logits, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("vit.image_processing_pil_vit.ViTImageProcessorPil", VIT),
        ("clip.image_processing_pil_clip.CLIPImageProcessorPil", CLIP),
        ("convnext.image_processing_pil_convnext.ConvNextImageProcessorPil", CONVNEXT),
        (
            "convnext.image_processing_pil_convnext.ConvNextImageProcessorPil",
            CONVNEXT | {"size": {"shortest_edge": 384}},
        ),
    ],
)
@pytest.mark.parametrize("size", [(40, 60), (61, 40)])
def test_pixels_are_those_of_the_library(kind: str, said: dict[str, Any], size: tuple[int, int]) -> None:
    make_torchvision_importable()
    import importlib

    module, _, name = kind.rpartition(".")
    processor = getattr(importlib.import_module(f"transformers.models.{module}"), name)(**said)
    expected = np.asarray(processor(photo(*size), return_tensors="np")["pixel_values"][0])
    codec = ImageCodec(**preprocessor_input(said).model_dump(), answers=AnswerEncoder(ModelSpec((), ())))
    found = codec.row(photo(*size))
    assert found.shape == expected.shape
    # One step of 255 is at most 0.008 here; the library rounds and crops the same way.
    np.testing.assert_allclose(found, expected, atol=0.02)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (VIT | {"image_processor_type": "MobileViTImageProcessor"}, "it is for MobileViTImageProcessor"),
        (
            {key: value for key, value in VIT.items() if key != "image_processor_type"},
            "it is for a class without a name",
        ),
        (VIT | {"do_resize": False}, "it does not resize"),
        (VIT | {"rescale_factor": 1 / 127.5}, "it does not scale pixels by 1/255"),
        (VIT | {"do_rescale": False}, "it does not scale pixels by 1/255"),
        (VIT | {"resample": None}, r"it does not say by which filter \(resample\)"),
        (VIT | {"image_mean": 0.5}, "it does not give mean and standard deviation of three channels"),
        (VIT | {"do_center_crop": True}, "it distorts images before it cuts"),
        (VIT | {"size": {"longest_edge": 9}}, "its size is {'longest_edge': 9}"),
        (CLIP | {"do_center_crop": False}, "it leaves images in different shapes"),
        (CLIP | {"size": {"shortest_edge": 20}}, "it pads images"),
        (CONVNEXT | {"size": {"height": 9, "width": 9}}, "its size is"),
    ],
)
def test_what_cannot_be_followed_is_asked_for(said: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=rf"base.image: .*preprocessor_config.json cannot be followed, {error}"):
        preprocessor_input(said)


@pytest.mark.parametrize("short", [*range(225, 300), 342])
def test_the_crop_leads_back_to_the_short_side(short: int) -> None:
    image = preprocessor_input(CLIP | {"size": {"shortest_edge": short}, "crop_size": 224})
    assert int(224 / image.crop) == short


def test_old_files_of_the_library(tmp_path: Path) -> None:
    """Sizes as one number, filters by default: as written before 2023."""
    old = {
        "feature_extractor_type": "ViTFeatureExtractor",
        "size": 224,
        "resample": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    assert (preprocessor_input(old).size, preprocessor_input(old).fit) == ((224, 224), "stretch")
    convnext = old | {"feature_extractor_type": "ConvNextFeatureExtractor"}
    assert (preprocessor_input(convnext).size, preprocessor_input(convnext).fit) == ((224, 224), "crop")
    assert preprocessor_input(convnext).crop == 0.875
