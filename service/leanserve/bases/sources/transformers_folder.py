"""What a folder written by `save_pretrained` says about its model, read from its JSON files alone.

Two layouts: that of transformers, and that of sentence-transformers, where `modules.json` tells how token vectors
become one embedding. Nothing here imports transformers, so that a start from the cache stays quick.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from leanserve.bases.checkpoints import file_digest
from leanserve.contracts import Json
from leanserve.errors import ConfigError

Task = Literal["text classification", "image classification", "embedding"]
Pooling = Literal["mean", "cls"]

WEIGHTS, SHARDS = "model.safetensors", "model.safetensors.index.json"
JSON_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
"""Files that decide answers, besides the weights and what `modules.json` names."""
UNBOUNDED = 1_000_000
"""Tokenizers without a limit name a very large number."""
LONGEST = 8192
"""Tokens beyond which no text is served."""
DEFAULT_LENGTH = 512
MODES = {"mean": "mean", "cls": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
"""By what sentence-transformers writes, today and in its first years."""

OTHER_TASKS = {
    "ForTokenClassification": "a class per token",
    "ForQuestionAnswering": "the spans of answers",
    "ForMaskedLM": "words for masked places",
    "ForCausalLM": "the next word",
    "HeadModel": "the next word",
    "ForConditionalGeneration": "generated text",
    "ForMultipleChoice": "a choice among several texts",
    "ForNextSentencePrediction": "whether a text follows another",
    "ForPreTraining": "what it was pretrained for",
}
"""What models of texts give that is not served, by how the library's classes are called."""


@dataclass(frozen=True)
class TransformersFolder:
    """A checkpoint on disk; `path` is the folder that the user named."""

    path: Path

    @cached_property
    def model_path(self) -> Path:
        """The folder of the transformers model: `path` itself, or a sub-folder in the layout of sentence-transformers.

        Raises:
            ConfigError: there is no model in it, or modules that are not known.
        """
        unknown = [name for name, _ in self._modules if name not in {"Transformer", "Pooling", "Normalize"}]
        if unknown:
            raise ConfigError(
                f"base.transformers: modules.json of {self.path} ends in {unknown[0]}, of which only Transformer, "
                "Pooling and Normalize are read; build the model in a module of your own and bring it with base.python"
            )
        path = self.path / next((path for name, path in self._modules if name == "Transformer"), "")
        if not (path / "config.json").is_file():
            raise ConfigError(f"base.transformers: there is no config.json in {path}; save_pretrained writes one")
        return path

    @cached_property
    def config(self) -> Mapping[str, Json]:
        """config.json.

        Raises:
            ConfigError: what it describes cannot be served.
        """
        config: Mapping[str, Json] = _read(self.model_path / "config.json")
        if "quantization_config" in config:
            raise ConfigError(
                f"base.transformers: {self.model_path} is quantized already; bring the float checkpoint, and let the "
                "passes of the variants quantize it"
            )
        return config

    @property
    def task(self) -> Task:
        """By the architecture for which the weights were saved.

        Raises:
            ConfigError: for something that is not served.
        """
        saved_as = self.architecture
        if self._modules or not saved_as:
            return "embedding"
        if saved_as.endswith("ForImageClassification"):
            return "image classification"
        if saved_as.endswith("ForSequenceClassification"):
            return "text classification"
        if saved_as.endswith("Model") and "Head" not in saved_as:
            return "embedding"
        raise self._not_served(saved_as)

    @property
    def architecture(self) -> str:
        """The library's class from which the weights were saved; empty where the config does not tell."""
        return next(iter(self.config.get("architectures") or ()), "")

    @property
    def of_sentence_transformers(self) -> bool:
        """Whether it is in that library's layout."""
        return bool(self._modules)

    @property
    def weights(self) -> tuple[Path, ...]:
        """The safetensors, in one file or several.

        Raises:
            ConfigError: there are none.
        """
        if (self.model_path / WEIGHTS).is_file():
            return (self.model_path / WEIGHTS,)
        if (self.model_path / SHARDS).is_file():
            names = sorted(set(_read(self.model_path / SHARDS)["weight_map"].values()))
            return tuple(self.model_path / name for name in names)
        pickles = sorted(path.name for path in self.model_path.glob("*.bin"))
        found = f"; {pickles[0]} is a pickle, and loading one can run any code" if pickles else ""
        raise ConfigError(
            f"base.transformers: there is no {WEIGHTS} in {self.model_path}{found}. Where you trust the checkpoint, "
            "load it with transformers and save it again (save_pretrained writes safetensors)"
        )

    @property
    def tokenizer(self) -> Path:
        return self.model_path / "tokenizer.json"

    @property
    def max_length(self) -> int:
        """Tokens per text: the least limit that sentence-transformers, tokenizer and model name."""
        limits = (
            self._optional("sentence_bert_config.json").get("max_seq_length"),
            self._optional("tokenizer_config.json").get("model_max_length"),
            self.config.get("max_position_embeddings"),
            self.config.get("n_positions"),
        )
        known = [int(limit) for limit in limits if limit is not None and 0 < limit < UNBOUNDED]
        return min(*known, LONGEST) if known else DEFAULT_LENGTH

    @property
    def pooling(self) -> Pooling:
        """How token vectors become an embedding; mean where nothing is said.

        Raises:
            ConfigError: in a way that is not known here.
        """
        path = next((path for name, path in self._modules if name == "Pooling"), None)
        if path is None:
            return "mean"
        declared = _read(self.path / path / "config.json")
        modes = declared.get("pooling_mode") or [name for name in declared if name.startswith("pooling_mode_")]
        chosen = [modes] if isinstance(modes, str) else [name for name in modes if declared.get(name, True)]
        if len(chosen) != 1 or chosen[0] not in MODES:
            raise ConfigError(
                f"base.pooling: {self.path / path} pools by {' and '.join(chosen) or 'nothing'}, which is not known "
                "here; say mean or cls, or bring the model with base.python"
            )
        return "cls" if MODES[chosen[0]] == "cls" else "mean"

    @property
    def length(self) -> Literal["unit", "free"]:
        """Of embeddings: 1 unless a `modules.json` leaves them as they are."""
        names = [name for name, _ in self._modules]
        return "unit" if "Normalize" in names or not names else "free"

    def labels(self, classes: int) -> tuple[str, ...]:
        """Names of the classes; one that stands twice gets its number, because labels are the keys of the scores."""
        named = self.config.get("id2label") or {}
        labels = [str(named.get(str(number), f"LABEL_{number}")) for number in range(classes)]
        return tuple(
            label if label not in labels[:number] else f"{label} ({number})" for number, label in enumerate(labels)
        )

    @property
    def prompt(self) -> str:
        """What sentence-transformers puts before every text by default."""
        said = self._optional("config_sentence_transformers.json", self.path)
        return str((said.get("prompts") or {}).get(said.get("default_prompt_name") or "", ""))

    def preprocessor(self) -> Mapping[str, Json]:
        """preprocessor_config.json.

        Raises:
            ConfigError: there is none.
        """
        said: Mapping[str, Json] = _read(self.model_path / "preprocessor_config.json")
        return said

    def digest(self) -> str:
        """sha256 (hex) over every file that decides answers, whatever the name of the folder."""
        poolings = [self.path / path / "config.json" for name, path in self._modules if name == "Pooling"]
        said = ("modules.json", "config_sentence_transformers.json")
        others = [self.model_path / name for name in (*JSON_FILES, "sentence_bert_config.json")]
        total = hashlib.sha256()
        for path in (*self.weights, *others, *(self.path / name for name in said), *poolings):
            if path.is_file():
                total.update(f"{path.name} {file_digest(path)}\n".encode())
        return total.hexdigest()

    def _not_served(self, saved_as: str) -> ConfigError:
        gives = next((words for ending, words in OTHER_TASKS.items() if saved_as.endswith(ending)), None)
        told = f"base.task: {self.model_path} was saved as {saved_as}" + (f", which gives {gives}" if gives else "")
        embed = "`task: embedding` takes the model without that head; with it, " if gives else ""
        return ConfigError(
            f"{told}; served are texts to classes or to embeddings, and images to classes. {embed}build it in a "
            "module of your own and bring it with base.python"
        )

    @cached_property
    def _modules(self) -> tuple[tuple[str, str], ...]:
        """Kind and folder of the modules in the layout of sentence-transformers; none in that of transformers."""
        if not (self.path / "modules.json").is_file():
            return ()
        return tuple((item["type"].rpartition(".")[2], item["path"]) for item in _read(self.path / "modules.json"))

    def _optional(self, name: str, folder: Path | None = None) -> Mapping[str, Json]:
        path = (folder or self.model_path) / name
        said: Mapping[str, Json] = _read(path) if path.is_file() else {}
        return said


def _read(path: Path) -> Json:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"base.transformers: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"base.transformers: {path} is not valid JSON: {error}") from error
