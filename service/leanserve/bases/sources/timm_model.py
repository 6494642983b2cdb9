"""`base: {timm: NAME}`: a model of timm, with the preprocessing its weights were evaluated with.

timm knows of every set of weights how images were resized, cropped and normalised for it; that becomes the codec of
the base, so that nobody copies these numbers. Weights are a file, timm's own on the hub (`hub`), or `random` ones of
the right shapes, which run as fast as real ones and know nothing.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanserve.bases.checkpoints import load_weights, read_state, weights_digest
from leanserve.bases.description import Description
from leanserve.bases.inputs import described, image_input, image_tensor
from leanserve.bases.probing import spec_of_inputs
from leanserve.bases.sources.hub import hub_file, is_repository
from leanserve.bases.sources.python_imports import make_torchvision_importable
from leanserve.bases.tracing import traced
from leanserve.config.base_section import ImageInput, TimmBase
from leanserve.contracts import CLASSES, ModelSpec, TensorSpec, TorchModel
from leanserve.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

HUB_FILE = "model.safetensors"
IMAGENET_LABELS = "imagenet_labels.txt"
"""In the package of the shipped bases, one name per line."""
UNTRAINED_SEED = 0
IMAGENET_CLASSES = 1000
NEAR = 5


@dataclass(frozen=True)
class TimmSource:
    """A `bases.origin.Source`."""

    declared: TimmBase
    folder: Path

    def fingerprint(self) -> str:
        """Of the weights and the libraries; `hub` needs no network once the file is in the local cache."""
        try:
            versions = [f"{library}=={metadata.version(library)}" for library in ("timm", "torch")]
        except metadata.PackageNotFoundError as error:
            raise _extra_is_missing() from error
        path = self._file()
        weights = (
            f"random {UNTRAINED_SEED}" if path is None else weights_digest(path) + (self.declared.weights_key or "")
        )
        return hashlib.sha256(" ".join((self.declared.timm, weights, *versions)).encode()).hexdigest()

    def describe(self) -> Description:
        config = _pretrained_config(self.declared.timm)
        image = image_input(self.declared.image, lambda: preprocessing(self.declared.timm, config))
        inputs = (image_tensor(image),)
        classes = self._classes(config)
        module, caveats = self._module(classes, inputs[0].field())
        found = traced(module, spec_of_inputs(inputs, self.declared.rows))
        outputs = found.outputs
        if not classes:
            outputs = (outputs[0].model_copy(update={"meaning": "embedding", "evidence": "form"}), *outputs[1:])
        labels = self.declared.labels or self._class_names(classes)
        declared = self.declared.model_copy(update={"image": image, "labels": labels})
        found = found.model_copy(update={"outputs": outputs, "caveats": caveats + found.caveats})
        return described(declared, self.folder, self.declared.timm.partition(".")[0], found)

    def model(self, spec: ModelSpec) -> TorchModel:
        module, _ = self._module(self._classes(_pretrained_config(self.declared.timm)), spec.inputs[0])
        return TorchModel(module, spec)

    def _module(self, classes: int, image: TensorSpec) -> tuple[nn.Module, tuple[str, ...]]:
        """A fresh module with its weights, in eval mode, and what everyone must know of these.

        Without classes it gives pooled features.
        """
        import torch

        timm = imported_timm()
        config = _pretrained_config(self.declared.timm)
        shape = image.shape
        options: dict[str, Any] = {"num_classes": classes, "in_chans": shape[0]}
        if config.fixed_input_size and tuple(shape) != tuple(config.input_size):
            options["img_size"] = shape[1:]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(UNTRAINED_SEED)
            module: nn.Module = timm.create_model(self.declared.timm, **options)
        module = module.float().eval()
        path = self._file()
        return module, ("untrained",) if path is None else load_weights(module, path, self.declared.weights_key)

    def _classes(self, config: Any) -> int:
        """Number of classes: by the classifier in a file (0 if it has none), else as timm's own weights have."""
        path = self._file()
        if path is None:
            return int(config.num_classes)
        first = config.classifier if isinstance(config.classifier, str) else (config.classifier or ("fc",))[0]
        found = [
            tensor
            for name, tensor in read_state(path, self.declared.weights_key).items()
            if f".{name}".endswith(f".{first}.weight")
        ]
        return len(found[0]) if found else 0

    def _class_names(self, classes: int) -> tuple[str, ...] | None:
        """timm's, unless the config says that the numbers are no classes; a single one is none either."""
        outputs = self.declared.outputs or ()
        first = next(iter(outputs.values() if isinstance(outputs, Mapping) else outputs), "logits")
        return class_names(classes) if classes > 1 and first in CLASSES else None

    def _file(self) -> Path | None:
        """The file with the weights; `None` for random ones."""
        if self.declared.weights == "random":
            return None
        if self.declared.weights == "hub":
            return _on_the_hub(self.declared.timm)
        return self.folder / self.declared.weights


def imported_timm() -> Any:
    """The library.

    Raises:
        ConfigError: it is not installed.
    """
    make_torchvision_importable()
    try:
        import timm
    except ModuleNotFoundError as error:
        raise _extra_is_missing() from error
    return timm


def preprocessing(name: str, config: Any) -> ImageInput:
    """How timm prepares images for the evaluation of these weights.

    Raises:
        ConfigError: it is none of the ways that `base.image` can express.
    """
    from timm.data import resolve_data_config

    found = resolve_data_config(pretrained_cfg=config.to_dict())
    channels, height, width = found["input_size"]
    whole = found["crop_mode"] == "squash" and found["crop_pct"] == 1
    centre = found["crop_mode"] == "center" and found["crop_pct"] <= 1 and height == width
    if channels != 3 or not (whole or centre):
        raise ConfigError(
            f"base.image: timm prepares images for {name} in a way of its own (input {channels} x {height} x "
            f"{width}, crop mode {found['crop_mode']}, crop {found['crop_pct']}); declare base.image"
        )
    return ImageInput(
        size=(width, height),
        fit="stretch" if whole else "crop",
        crop=found["crop_pct"],
        resize=found["interpolation"],
        mean=found["mean"],
        std=found["std"],
    )


def class_names(classes: int) -> tuple[str, ...]:
    """The names of ImageNet's thousand classes; the classes of others are numbered."""
    if classes == IMAGENET_CLASSES:
        return tuple(files("leanserve_models").joinpath(IMAGENET_LABELS).read_text(encoding="utf-8").splitlines())
    return tuple(f"class {number}" for number in range(classes))


def _pretrained_config(name: str) -> Any:
    """What timm knows about these weights, or about its favourite ones if the name has no tag."""
    timm = imported_timm()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), NEAR)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
        raise ConfigError(f"base.timm: timm {timm.__version__} has no model '{name}'; {hint}")
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ConfigError(f"base.timm: {error} {_tags(name)}") from error


def _on_the_hub(name: str) -> Path:
    """timm's own weights; the name must say which, so that tomorrow's timm serves the same ones.

    Nearly all lie where the name says. Only for the others, and before the first download, is timm asked.
    """
    from huggingface_hub import try_to_load_from_cache

    if is_repository(f"timm/{name}"):
        cached = try_to_load_from_cache(f"timm/{name}", HUB_FILE)
        if isinstance(cached, str):
            return Path(cached)
    config = _pretrained_config(name)
    if "." not in name:
        raise ConfigError(f"base.timm: with weights from the hub the name says which. {_tags(name)}")
    if not config.hf_hub_id:
        raise ConfigError(f"base.weights: timm has no weights for '{name}' on the hub; give a file. {_tags(name)}")
    return hub_file(config.hf_hub_id, config.hf_hub_filename or HUB_FILE)


def _tags(name: str) -> str:
    """The weights there are for a model, timm's favourite first."""
    timm = imported_timm()
    architecture = name.partition(".")[0]
    tags = timm.list_pretrained(f"{architecture}.*")
    favourite = timm.get_pretrained_cfg(architecture)
    tags.sort(key=lambda known: known != f"{architecture}.{favourite.tag}")
    return f"There are: {', '.join(tags)}" if tags else "There are none for this model"


def _extra_is_missing() -> ConfigError:
    return ConfigError("base.timm needs the extra 'vision': pip install 'leanserve[vision]'")
