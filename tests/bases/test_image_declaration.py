"""`base.image`: in full, or which files are read alone where the model brings its preprocessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from leanserve.bases.inputs import image_input
from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.codecs.image_formats import FORMAT_NAMES
from leanserve.codecs.images import ImageCodec
from leanserve.config.base_section import ImageFiles, ImageInput
from leanserve.config.schema import read_config
from leanserve.contracts import Base
from leanserve.errors import ConfigError

WHOLE = "size: [2, 2], mean: [0, 0, 0], std: [1, 1, 1]"
OWN = ImageInput(size=(3, 3), mean=(0.5,) * 3, std=(0.5,) * 3, fit="crop")


def image_of(folder: Path, base: str) -> ImageFiles | None:
    path = folder / "c.yaml"
    path.write_text(f"base: {base}\nvariants: [{{name: a}}]\n")
    found: ImageFiles | None = getattr(read_config(path).base, "image")  # noqa: B009 - each form has its own
    return found


def digits(**image: Any) -> Base:
    return open_base(Origin.model_validate({"base": {"shipped": "digits", "image": image or None}}))


def test_by_default_every_format_is_read_as_stored() -> None:
    assert (OWN.orientation, OWN.formats) == ("stored", FORMAT_NAMES)


@pytest.mark.parametrize("form", ["timm: x", "transformers: x/y", "shipped: digits"])
def test_where_the_model_brings_its_preprocessing_files_may_be_declared_alone(tmp_path: Path, form: str) -> None:
    found = image_of(tmp_path, f"{{{form}, image: {{orientation: exif, formats: [jpeg, webp]}}}}")
    assert found == ImageFiles(orientation="exif", formats=("jpeg", "webp"))
    completed = image_input(found, lambda: OWN)
    assert completed == OWN.model_copy(update={"orientation": "exif", "formats": ("jpeg", "webp")})


@pytest.mark.parametrize("form", ["timm: x", "python: 'a:b'", "onnx: x.onnx", "torch_export: x.pt2"])
def test_in_full_it_replaces_what_the_model_brings(tmp_path: Path, form: str) -> None:
    found = image_of(tmp_path, f"{{{form}, image: {{{WHOLE}, orientation: exif}}}}")
    assert isinstance(found, ImageInput)
    assert found.orientation == "exif"
    assert image_input(found, lambda: OWN) is found
    assert image_input(None, lambda: OWN) is OWN


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("{python: 'a:b', image: {orientation: exif}}", "image needs size, mean and std as well"),
        ("{onnx: x.onnx, image: {}}", "image needs size, mean and std as well"),
        ("{timm: x, image: {orientation: exfi}}", "base.image.orientation: Input should be 'stored' or 'exif'"),
        ("{timm: x, image: {orientatoin: exif}}", "unknown key 'orientatoin'; did you mean 'orientation'"),
        ("{timm: x, image: {size: [2, 2], orientation: exif}}", "base.image.mean: the key 'mean' is missing"),
        (f"{{timm: x, image: {{{WHOLE}, crp: 1}}}}", "unknown key 'crp'; did you mean 'crop'"),
        ("{timm: x, image: {formats: [heic]}}", "base.image.formats.0: Input should be 'png', 'jpeg'"),
        ("{timm: x, image: {formats: []}}", "base.image.formats: must have at least 1 entry"),
        ("{shipped: digits, image: {size: [2, 2]}}", "unknown key 'size'; known keys are formats, orientation"),
    ],
)
def test_mistakes_are_one_line_with_the_remedy(tmp_path: Path, base: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^.*c.yaml:1: .*{said}") as refused:
        image_of(tmp_path, base)
    assert len(str(refused.value).splitlines()) <= 2


def test_a_shipped_base_of_images_takes_it() -> None:
    codec = digits(orientation="exif", formats=["jpeg"]).codec
    assert isinstance(codec, ImageCodec)
    assert (codec.orientation, codec.formats, codec.size) == ("exif", ("jpeg",), (32, 32))


def test_orientation_decides_answers_and_formats_do_not() -> None:
    """What is built stays valid where formats are switched; rows that are no longer read change the data's digest."""
    plain = digits().digest
    assert digits(formats=["jpeg"]).digest == plain
    assert digits(orientation="stored").digest == plain
    assert digits(orientation="exif").digest != plain


def test_a_shipped_base_of_texts_refuses_it() -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises(ConfigError, match=r"base.image: the base 'minilm' takes no images"):
        open_base(Origin.model_validate({"base": {"shipped": "minilm", "image": {"orientation": "exif"}}}))
