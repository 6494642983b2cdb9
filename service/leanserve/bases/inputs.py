"""The input tensors that the config declares: by an image's size, by a tokenizer, or one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from leanserve.bases.description import Description, Probed, Tensor
from leanserve.bases.meanings import settled
from leanserve.bases.probing import SizeBounds
from leanserve.codecs.images import CHANNELS
from leanserve.config.base_section import AudioInput, BroughtBase, ImageFiles, ImageInput, TextInput
from leanserve.errors import ConfigError
from leanserve.texts import STRING

LONGEST_NAME = 63
MASKED_TEXT = (
    Tensor(name="input_ids", dtype="int64", shape=(None,)),
    Tensor(name="attention_mask", dtype="int64", shape=(None,)),
)
"""What a text encoder takes: token ids, and 1 where there is a token, 0 where padding."""


def image_tensor(image: ImageInput) -> Tensor:
    """The input of a model of images, float32 [C, H, W]."""
    width, height = image.size
    return Tensor(name="image", dtype="float32", shape=(CHANNELS[image.mode], height, width))


def audio_tensor(audio: AudioInput) -> Tensor:
    """The input of a model of samples, float32."""
    shapes = {"plain": (audio.samples,), "channel_first": (1, audio.samples), "channel_last": (audio.samples, 1)}
    return Tensor(name="audio", dtype="float32", shape=shapes[audio.layout])


def bounds_of(declared: BroughtBase) -> SizeBounds:
    """Of the dynamic axes of the inputs, as far as the config tells."""
    if declared.audio is not None:
        return SizeBounds(declared.audio.longest, declared.audio.least_samples)
    if declared.text is not None:
        return SizeBounds(declared.text.max_length)
    return SizeBounds(declared.image.max_side) if isinstance(declared.image, ImageInput) else SizeBounds()


def image_input(declared: ImageFiles | None, own: Callable[[], ImageInput]) -> ImageInput:
    """The preprocessing that the config declares in full, else the model's own, for such files as the config wants."""
    if isinstance(declared, ImageInput):
        return declared
    return own() if declared is None else own().model_copy(update=declared.model_dump())


def declared_inputs(declared: BroughtBase) -> tuple[Tensor, ...] | None:
    """The input tensors by `image`, `text`, `audio` or `inputs`; `None` if the config has none of them."""
    if isinstance(declared.image, ImageInput):
        return (image_tensor(declared.image),)
    if declared.text is not None:
        return MASKED_TEXT
    if declared.audio is not None:
        return (audio_tensor(declared.audio),)
    if declared.inputs is not None:
        return tuple(Tensor(name=name, dtype=item.dtype, shape=item.shape) for name, item in declared.inputs.items())
    return None


def described(
    declared: BroughtBase, folder: Path, name: str, found: Probed, classes: tuple[str, ...] = ()
) -> Description:
    """The description of a model whose preprocessing the config declares; `classes` are the labels that the model has
    by itself, for an output of so many numbers if there is one.

    Raises:
        ConfigError: the labels cannot be read, or do not fit the outputs, or what is declared of these does not.
    """
    told = declared.labels is None and any(item.shape == (len(classes),) for item in found.outputs)
    labels = classes if told else read_labels(declared, folder)
    given = settled(found.outputs, labels, declared.outputs, "values" if declared.text is None else "embedding")
    return Description(
        name=declared.name or name,
        inputs=with_state(found.inputs, given.tensors, declared.state),
        outputs=given.tensors,
        labels=labels,
        labelled=given.labelled,
        image=declared.image if isinstance(declared.image, ImageInput) else None,
        text=None if declared.text is None else resolved_text(declared.text, folder),
        audio=declared.audio,
        max_length=found.max_length,
        rows=declared.rows,
        step=found.step,
        least=found.least,
        caveats=found.caveats,
    )


def with_state(inputs: Sequence[Tensor], outputs: Sequence[Tensor], pairs: Mapping[str, str]) -> tuple[Tensor, ...]:
    """The inputs; those that are state say which output is their next value.

    Raises:
        ConfigError: there is no such input or output, or the two are not the same kind of tensor of known sizes.
    """
    own, given = ({item.name: item for item in items} for items in (inputs, outputs))
    for taken, left in pairs.items():
        for name, known in ((taken, own), (left, given)):
            if name not in known:
                raise ConfigError(f"base.state: the model has no '{name}' there; it has {', '.join(known)}")
        one, other = own[taken], given[left]
        if (one.dtype, one.shape) != (other.dtype, other.shape) or None in one.shape or one.dtype == STRING:
            raise ConfigError(
                f"base.state: '{taken}' is {one.dtype} {list(one.shape)} per row and '{left}' {other.dtype} "
                f"{list(other.shape)}; a state has numbers of one dtype and known sizes in both (base.inputs fixes "
                "sizes)"
            )
    return tuple(item.model_copy(update={"next_from": pairs.get(item.name)}) for item in inputs)


def served_name(path: Path) -> str:
    """The name of a model that has none but its file's: that, as far as it can stand in URLs and metric labels."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-")[:LONGEST_NAME] or "model"


def resolved_text(text: TextInput, folder: Path) -> TextInput:
    """With the tokenizer's file found.

    Raises:
        ConfigError: there is none.
    """
    path = folder / text.tokenizer
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"base.text.tokenizer: there is no file {path}; it is the tokenizer.json of the model")
    return text.model_copy(update={"tokenizer": path.resolve()})


def read_labels(declared: BroughtBase, folder: Path) -> tuple[str, ...]:
    """The class names, in order; empty for a model that does not classify.

    Raises:
        ConfigError: the file cannot be read, or a name stands twice.
    """
    if declared.labels is None:
        return ()
    if isinstance(declared.labels, Path):
        try:
            lines = (folder / declared.labels).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"base.labels: cannot read {folder / declared.labels}: {error}") from error
        labels = tuple(line.strip() for line in lines if line.strip())
    else:
        labels = declared.labels
    for index, label in enumerate(labels):
        if label in labels[:index]:
            raise ConfigError(f"base.labels: '{label}' stands twice; the labels are the keys of the scores")
    return labels
