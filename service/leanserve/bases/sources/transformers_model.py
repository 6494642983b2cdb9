"""`base: {transformers: FOLDER_OR_NAME}`: a checkpoint of the transformers library.

Texts become class logits or one pooled embedding, images become class logits. Weights are safetensors, and code that
a checkpoint brings is never run. The library takes seconds to import, so that everything but running the model is read
from the checkpoint's JSON files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanserve.bases.checkpoints import file_digest
from leanserve.bases.description import Description, Tensor
from leanserve.bases.inputs import MASKED_TEXT, image_input, image_tensor, read_labels, resolved_text
from leanserve.bases.meanings import settled
from leanserve.bases.probing import spec_of_inputs
from leanserve.bases.sources.hub import hub_folder, is_repository
from leanserve.bases.sources.transformers_folder import Task, TransformersFolder
from leanserve.bases.sources.transformers_images import preprocessor_input
from leanserve.bases.sources.transformers_loading import padding_of, plain_module
from leanserve.bases.tracing import traced
from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.text import TextCodec
from leanserve.config.base_section import ImageInput, TextInput, TransformersBase
from leanserve.contracts import ModelSpec, TorchModel
from leanserve.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

PATTERNS = ("*.json", "model*.safetensors", "*/model*.safetensors")
"""Files of a checkpoint on the hub, in either layout."""
NEEDED = ("*config.json", "*model*.safetensors")
LIBRARIES = ("torch", "transformers")
OTHERWISE = (
    "Served are models that take texts as input_ids and attention_mask, or images as pixel_values, and nothing else; "
    "put others into a module of your own and bring it with base.python"
)


@dataclass(frozen=True)
class TransformersSource:
    """A `bases.origin.Source`."""

    declared: TransformersBase
    folder: Path

    def fingerprint(self) -> str:
        total = hashlib.sha256(f"{self._found.digest()} {self.declared.task} {self.declared.pooling}\n".encode())
        for library in LIBRARIES:
            total.update(f"{library}=={_version(library)}\n".encode())
        if self.declared.text is not None:
            total.update(file_digest(resolved_text(self.declared.text, self.folder).tokenizer).encode())
        return total.hexdigest()

    def describe(self) -> Description:
        task = self._task()
        image = self._image() if task == "image classification" else None
        if image is None and self.declared.image is not None:
            raise ConfigError("base.image: the checkpoint takes texts, no images")
        module = self._module()
        if image is not None:
            return self._described(module, (image_tensor(image),), image=image)
        text = self._text(module)
        _check_end(module, text)
        ids, mask = MASKED_TEXT
        prompt = self._found.prompt
        return self._described(
            module,
            (ids.model_copy(update={"pad": float(padding_of(module))}), mask),
            text=text,
            caveats=(f"texts are not preceded by the checkpoint's prompt '{prompt}'",) if prompt else (),
        )

    def model(self, spec: ModelSpec) -> TorchModel:
        return TorchModel(self._module(), spec)

    @cached_property
    def _found(self) -> TransformersFolder:
        name = self.declared.transformers
        if (self.folder / name).is_dir():
            return TransformersFolder((self.folder / name).resolve())
        if not is_repository(name) or name.startswith("."):
            raise ConfigError(f"base.transformers: there is no folder {self.folder / name}")
        return TransformersFolder(hub_folder(name, PATTERNS, NEEDED))

    def _task(self) -> Task:
        if self.declared.inputs is not None:
            raise ConfigError("base.inputs: a model of transformers takes texts or images; see base.text, base.image")
        if self.declared.task == "auto":
            return self._found.task
        if self.declared.task == "embedding":
            return "embedding"
        images = self._found.architecture.endswith("ForImageClassification")
        return "image classification" if images else "text classification"

    def _described(self, module: nn.Module, inputs: Sequence[Tensor], **how: Any) -> Description:
        """With the outputs found by running the module."""
        embeds = self._task() == "embedding"
        found = traced(module, spec_of_inputs(inputs, self.declared.rows), OTHERWISE)
        labels = () if embeds else self._labels(found.outputs[0])
        given = settled(found.outputs, labels, self.declared.outputs, "embedding")
        return Description(
            name=self.declared.name or _served_name(self.declared.transformers),
            inputs=tuple(inputs),
            outputs=given.tensors,
            labels=labels,
            labelled=given.labelled,
            max_length=how["text"].max_length if "text" in how else how["image"].max_side,
            rows=self.declared.rows,
            caveats=how.pop("caveats", ()) + found.caveats,
            **how,
        )

    def _labels(self, logits: Tensor) -> tuple[str, ...]:
        classes = logits.shape[0] or 0
        kind = self._found.config.get("problem_type")
        if classes < 2 or kind not in {None, "single_label_classification"}:
            raise ConfigError(
                f"base.task: the checkpoint gives {classes} value{'s' if classes != 1 else ''} per row for the problem "
                f"'{kind or 'regression'}', and answers here are one class of several; build it in a module of your "
                "own and bring it with base.python"
            )
        labels = read_labels(self.declared, self.folder) or self._found.labels(classes)
        if len(labels) != classes:
            raise ConfigError(f"base.labels: {len(labels)} labels for a model with {classes} classes")
        return labels

    def _image(self) -> ImageInput:
        return image_input(self.declared.image, lambda: preprocessor_input(self._found.preprocessor()))

    def _text(self, module: nn.Module) -> TextInput:
        """The tokenizer, and the length that model, tokenizer and config agree on."""
        limit = min(self._found.max_length, _positions(module))
        if self.declared.text is not None:
            text = resolved_text(self.declared.text, self.folder)
            return text.model_copy(update={"max_length": min(text.max_length, limit)})
        if not self._found.tokenizer.is_file():
            raise ConfigError(
                f"base.text.tokenizer: there is no {self._found.tokenizer}. Name a tokenizer.json, or write one: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) converts older formats"
            )
        return TextInput(tokenizer=self._found.tokenizer, max_length=limit)

    def _module(self) -> nn.Module:
        """A fresh module with its weights, in eval mode, float32."""
        return plain_module(self._found, self._task(), self.declared.pooling)


def _check_end(module: nn.Module, text: TextInput) -> None:
    """A model that answers at the end token needs one in every text."""
    end = getattr(module, "end", None)
    if end is None:
        return
    spec = ModelSpec(tuple(item.field() for item in MASKED_TEXT), ())
    if end not in TextCodec(text.tokenizer, text.max_length, AnswerEncoder(spec)).tokens(["a"])[0]:
        raise ConfigError(
            f"base.text.tokenizer: the model answers at the end token ({end}), which {text.tokenizer} does not put "
            "behind texts; give it a post-processor that does (TemplateProcessing of the library tokenizers)"
        )


def _positions(module: nn.Module) -> int:
    """Tokens for which the model has position vectors: some architectures keep the first ones for padding."""
    from torch import nn

    for name, part in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding):
            return part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
    return 8192


def _served_name(given: str) -> str:
    """The last part of a path or of a name on the hub, as a name that fits into URLs."""
    return re.sub(r"[^A-Za-z0-9._-]|^[^A-Za-z0-9]+", "-", Path(given).name).lstrip("-._")[:63] or "model"


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "absent"
