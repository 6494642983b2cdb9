"""The config sections `base:` and what belongs to it: which model is served, and how a request becomes its input.

One form per way of bringing a model; the first key names the form. What a form cannot find out by itself (labels,
preprocessing, input shapes) has a key here, and errors ask for it by that key. Paths are relative to the config file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from leanserve.codecs.audio_files import AUDIO_FORMATS, AudioFormat
from leanserve.codecs.geometry import Anchor, ImageFit
from leanserve.codecs.image_files import Orientation
from leanserve.codecs.image_formats import FORMAT_NAMES, FormatName
from leanserve.codecs.images import CHANNELS, Mode
from leanserve.config.section import Form, Name, Section, short_for, told_by_key
from leanserve.contracts import Json, Meaning, RowsTogether

MOST_ELEMENTS = 2**28
"""Numbers of a row: 1 GiB of float32."""
Resize = Literal["nearest", "bilinear", "bicubic", "lanczos"]


class ImageFiles(Section):
    """Which image files are read and how they are seen; the rest is known where a model brings its preprocessing."""

    orientation: Orientation = Field(
        "stored", description="exif: turned as the orientation tag says; stored: as evaluation libraries see them"
    )
    formats: tuple[FormatName, ...] = Field(FORMAT_NAMES, min_length=1, description="of files that are decoded")


class ImageInput(ImageFiles):
    """How an image becomes the model's input [C, H, W]."""

    mode: Mode = Field("RGB", description="colour, colour with blue first, or grey")
    size: tuple[Annotated[int, Field(ge=1)] | None, Annotated[int, Field(ge=1)] | None] = Field(
        description="[width, height] of the model's input; null: the image's own, by its proportions if one is given"
    )
    fit: ImageFit = Field(
        "stretch", description="to that size: distort, cut from the centre, or fill up what the image does not cover"
    )
    crop: float = Field(1.0, gt=0, le=1, description="with fit crop: share of the short side that is kept (crop_pct)")
    anchor: Anchor = Field("center", description="with fit letterbox: where the image lies; start: left and top")
    fill: tuple[Annotated[float, Field(ge=0, le=255)], ...] = Field(
        (0.0,), description="with fit letterbox: pixel value, or one per channel, of what the image does not cover"
    )
    max_side: int = Field(
        512, ge=16, le=8192, description="with a null in size: longest side; larger images are made smaller"
    )
    resize: Resize = Field("bilinear", description="filter")
    mean: tuple[float, ...] = Field(description="per channel, of pixels scaled to 0..1")
    std: tuple[float, ...] = Field(description="per channel, of pixels scaled to 0..1")

    @field_validator("fill", mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _one_value_per_channel(self) -> Self:
        channels = CHANNELS[self.mode]
        if not len(self.mean) == len(self.std) == channels:
            raise ValueError(f"an image of mode {self.mode} needs {channels} values in mean and in std")
        if len(self.fill) not in {1, channels}:
            raise ValueError(f"fill is one pixel value, or {channels} for an image of mode {self.mode}")
        if min(self.std) <= 0:
            raise ValueError("std must be above 0 in every channel")
        return self

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> Self:
        if self.fit == "crop" and None in self.size:
            raise ValueError("fit crop cuts to one size; give size as two numbers, or use letterbox or stretch")
        boxed, open_side = self.fit == "letterbox", None in self.size
        needs = (
            ("crop", self.fit == "crop", "fit crop"),
            ("anchor", boxed, "fit letterbox"),
            ("fill", boxed, "fit letterbox"),
            ("max_side", open_side, "a null in size"),
        )
        for key, has_effect, wanted in needs:
            if not has_effect and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect without {wanted}")
        return self


def _whole_or_files(value: Any) -> str:
    """Which of the two a mapping is meant to be."""
    if isinstance(value, Mapping):
        whole = bool(set(value) & (ImageInput.model_fields.keys() - ImageFiles.model_fields.keys()))
    else:
        whole = isinstance(value, ImageInput)
    return "base.image" if whole else "base.image_files"


IMAGE_FORMS: Mapping[str, type[ImageFiles]] = {"base.image": ImageInput, "base.image_files": ImageFiles}
"""By the tags that pydantic puts into the location of an error."""
AnyImage = Annotated[
    Annotated[ImageInput, Tag("base.image")] | Annotated[ImageFiles, Tag("base.image_files")],
    Discriminator(_whole_or_files),
]


class AudioInput(Section):
    """How a recording becomes the model's input: samples from -1 to 1, mono."""

    rate: int = Field(ge=1000, le=384_000, description="samples per second that the model was trained on")
    samples: Annotated[int, Field(ge=1, le=2**24)] | None = Field(
        description="of the model's input; null: any number, a recording is one row"
    )
    layout: Literal["plain", "channel_first", "channel_last"] = Field(
        "plain", description="of a row: [samples], [1, samples] or [samples, 1]"
    )
    hop: int | None = Field(
        None,
        ge=1,
        description="with samples: those from the beginning of one frame to that of the next; all by default",
    )
    least_samples: int = Field(1, ge=1, description="without samples: shorter recordings are filled up with silence")
    max_seconds: float = Field(
        600.0, gt=0, le=7200, description="longest recording, all those of a request together; without samples of a row"
    )
    formats: tuple[AudioFormat, ...] = Field(AUDIO_FORMATS, min_length=1, description="of files that are decoded")

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> Self:
        if self.samples is None and self.hop is not None:
            raise ValueError("hop has no effect without samples: a recording is one row")
        if self.samples is not None and self.least_samples > 1:
            raise ValueError("least_samples has no effect beside samples")
        return self

    @property
    def longest(self) -> int:
        """Samples of the longest row."""
        return self.samples or int(self.rate * self.max_seconds)


class TextInput(Section):
    """How a text becomes token ids."""

    tokenizer: Path = Field(description="the model's tokenizer.json, or the folder that has it")
    max_length: int = Field(256, ge=4, le=8192, description="tokens after which a text is cut, special ones included")


class TensorInput(Section):
    """One input tensor of a model that takes neither images nor texts."""

    dtype: str = Field(
        "float32", pattern="^(bool|u?int(8|16|32|64)|float(16|32|64)|string)$", description="numpy's name, or string"
    )
    shape: tuple[Annotated[int, Field(ge=1)] | None, ...] = Field(description="of one row; null: any size")

    @model_validator(mode="after")
    def _a_row_fits_into_memory(self) -> Self:
        if prod(size or 1 for size in self.shape) > MOST_ELEMENTS:
            raise ValueError(f"shape: a row has at most {MOST_ELEMENTS} numbers; is the first axis, of rows, left out?")
        return self


class KeyedWeights(Section):
    """A base whose weights may be one of several sets in a file."""

    weights: str | Path | None = Field(None, description="a file")
    weights_key: str | None = Field(
        None, min_length=1, description="which weights of the file, by the keys around them, such as state_dict_ema"
    )

    @model_validator(mode="after")
    def _a_key_needs_a_file(self) -> Self:
        if self.weights_key is not None and self.weights in {None, "hub", "random"}:
            raise ValueError("weights_key chooses among the weights of a file; name the file as weights")
        return self


def _known_meanings(value: Any) -> Any:
    """Checked before the two forms are told apart, so that an error speaks of what was written."""
    meanings = value.values() if isinstance(value, Mapping) else value
    if not isinstance(meanings, Iterable) or isinstance(meanings, str):
        raise ValueError("write a mapping from the name of an output to its meaning, or a list of meanings")
    known = get_args(Meaning)
    if wrong := [meaning for meaning in meanings if meaning not in known]:
        raise ValueError(f"{wrong[0]!r} is no meaning of an output; there are {', '.join(known)}")
    return value


Meanings = Annotated[Mapping[str, Meaning] | tuple[Meaning, ...], BeforeValidator(_known_meanings)]
"""Of outputs: by their names, or in their order."""


class ShippedBase(KeyedWeights, Form):
    """A base that comes with the service."""

    kind: ClassVar[str] = "shipped"
    shipped: Name = Field(description="its name; `base: NAME` is short for it")
    image: ImageFiles | None = Field(None, description="for a base of images: which files are read, and how")
    weights: str | None = Field(None, description="a file, hub or random, for bases that come without weights")


class BroughtBase(Form):
    """What is common to all forms that bring a model."""

    name: Name | None = Field(None, description="under which it is served; by default from the model's own name")
    labels: tuple[str, ...] | Path | None = Field(None, description="class names, or a text file with one per line")
    image: AnyImage | None = Field(
        None, description="for a model of images; `orientation` and `formats` alone where the model brings the rest"
    )
    text: TextInput | None = Field(None, description="for a model of token ids with a mask")
    audio: AudioInput | None = Field(None, description="for a model of samples of sound")
    inputs: Mapping[str, TensorInput] | None = Field(
        None, description="for any other model, in the order it takes them"
    )
    outputs: Meanings | None = Field(
        None, description="what the outputs mean, by name or in their order; by default what the model shows"
    )
    state: Mapping[str, str] = Field(
        default_factory=dict,
        description="inputs that are state, and the output that is the next value of each: kept for sequences",
    )
    rows: RowsTogether = Field(
        "any", description="which share a batch: any (the model must keep them apart), of one_length, or one at a time"
    )

    @model_validator(mode="after")
    def _one_kind_of_input(self) -> Self:
        given = [key for key in ("image", "text", "audio", "inputs") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"only one of image, text, audio and inputs can be given, not {' and '.join(given)}")
        return self


class _UnpreparedBase(BroughtBase):
    """What is common to models of which nothing but the config tells how images were prepared for them."""

    @model_validator(mode="after")
    def _image_is_whole(self) -> Self:
        if self.image is not None and not isinstance(self.image, ImageInput):
            raise ValueError("image needs size, mean and std as well: this model does not bring its preprocessing")
        return self


class PythonBase(_UnpreparedBase, KeyedWeights):
    """A torch module of the user's own."""

    kind: ClassVar[str] = "python"
    python: str = Field(
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="package.module:factory, found beside the config file or installed; returns a torch module",
    )
    arguments: Mapping[str, Json] = Field(default_factory=dict, description="keyword arguments of the factory")
    weights: Path | None = Field(None, description="state dict for the module: safetensors, or torch's own format")


class TimmBase(BroughtBase, KeyedWeights):
    """A model of timm."""

    kind: ClassVar[str] = "timm"
    timm: str = Field(description="timm's name of the model")
    weights: str = Field("hub", description="a file, `hub` (download once), or `random` (speed work only)")


class TransformersBase(BroughtBase):
    """A model of transformers."""

    kind: ClassVar[str] = "transformers"
    transformers: str = Field(description="a folder as written by save_pretrained, or the model's name on the hub")
    task: Literal["auto", "classification", "embedding"] = Field(
        "auto", description="class logits, or pooled and normalised embeddings; auto: by the checkpoint's architecture"
    )
    pooling: Literal["auto", "mean", "cls"] = Field("auto", description="of embeddings; auto: as the checkpoint says")


class OnnxBase(_UnpreparedBase):
    """An ONNX file."""

    kind: ClassVar[str] = "onnx"
    onnx: Path = Field(description="the file; tensors stored outside it are found beside it")


class TorchExportBase(_UnpreparedBase):
    """A program saved by torch.export."""

    kind: ClassVar[str] = "torch_export"
    torch_export: Path = Field(description="the .pt2 file, exported with a dynamic batch axis")


FORMS: tuple[type[Form], ...] = (
    ShippedBase,
    PythonBase,
    TimmBase,
    TransformersBase,
    OnnxBase,
    TorchExportBase,
)


AnyBase = Annotated[
    Annotated[ShippedBase, Tag("base.shipped")]
    | Annotated[PythonBase, Tag("base.python")]
    | Annotated[TimmBase, Tag("base.timm")]
    | Annotated[TransformersBase, Tag("base.transformers")]
    | Annotated[OnnxBase, Tag("base.onnx")]
    | Annotated[TorchExportBase, Tag("base.torch_export")],
    told_by_key("base", FORMS, "a base is the name of a shipped one, or"),
    short_for("shipped"),
]
