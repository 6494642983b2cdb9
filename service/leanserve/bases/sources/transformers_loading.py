"""The library's model of a checkpoint, whole, as a plain module: tensors in by position, one tensor out.

Nothing in it was left at random values, it takes what the service sends, and its head answers for rows of different
length in one batch as the library does for each row alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from leanserve.bases.sources.python_imports import make_torchvision_importable
from leanserve.bases.sources.transformers_folder import Pooling, Task, TransformersFolder
from leanserve.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

INPUTS = {"embedding": "input_ids", "text classification": "input_ids", "image classification": "pixel_values"}
"""What the library calls the main input of a model for a task."""
ENCODERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel",
}
"""Types of encoder-decoders with a class for the encoder alone, which such checkpoints are also saved from."""
POOLER = "pooler."
"""A head that checkpoints may lack where embeddings are pooled here."""
UNUSED = "position_ids"
"""Numbers from 0 that checkpoints may lack."""
SHOWN = 3


def plain_module(found: TransformersFolder, task: Task, pooling: Pooling | Literal["auto"]) -> nn.Module:
    """The checkpoint's model for a task, float32, in eval mode; `pooling` of embeddings, `auto`: as it says itself.

    Raises:
        ConfigError: it cannot be loaded, was saved for another task, or takes what is not served.
    """
    from leanserve.bases.modules.transformers_heads import ImageLogits, TextEmbedding

    model = _pretrained(found, task)
    _without_caches(model)
    if task == "image classification":
        return ImageLogits(model).eval()
    if task == "text classification":
        return _text_logits(model).eval()
    if getattr(model, "pooler", None) is not None:
        setattr(model, "pooler", None)  # noqa: B010 - a head that embeddings do not use
    return TextEmbedding(_encoder(model, found), found.pooling if pooling == "auto" else pooling, found.length).eval()


def padding_of(module: nn.Module) -> int:
    """The token id that fills up shorter texts; any where the model knows none, because the mask covers it."""
    pad = _pad_token(module.get_submodule("model"))
    return 0 if pad is None else pad


def _text_logits(model: Any) -> nn.Module:
    from leanserve.bases.modules.transformers_heads import EndTokenLogits, LastTokenLogits, TextLogits

    if hasattr(model, "classification_head") and model.config.is_encoder_decoder:
        return EndTokenLogits(model, model.base_model_prefix, model.config.eos_token_id)
    if hasattr(model, "score") and _pad_token(model) is None:
        return LastTokenLogits(model, model.base_model_prefix)
    return TextLogits(model)


def _pad_token(model: Any) -> int | None:
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    return pad if pad is not None and pad >= 0 else None


def _encoder(model: Any, found: TransformersFolder) -> Any:
    """The part of a model that gives the vectors of the text itself."""
    if not model.config.is_encoder_decoder or model.config.model_type in ENCODERS:
        return model
    if found.of_sentence_transformers:
        raise ConfigError(
            f"base.transformers: {found.path} is an encoder-decoder ({model.config.model_type}) in the layout of "
            "sentence-transformers, which is served for the family of T5 only; build it in a module of your own and "
            "bring it with base.python"
        )
    return model.get_encoder()


def _without_caches(model: nn.Module) -> None:
    """Decoders keep keys and values for the next word; nobody asks for one here."""
    for part in model.modules():
        config = getattr(part, "config", None)
        if getattr(config, "use_cache", False):
            setattr(config, "use_cache", False)  # noqa: B010 - of no type that is known here


def _pretrained(found: TransformersFolder, task: Task) -> nn.Module:
    loader = _loader(found, task)
    try:
        with _silent():
            model, told = loader.from_pretrained(
                found.weights[0].parent,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are told below
                output_loading_info=True,
                dtype="float32",
            )
    except Exception as error:  # a library of hundreds of architectures
        reason = str(error).strip().splitlines()
        raise ConfigError(
            f"base.transformers: {found.model_path} cannot be loaded: {reason[0] if reason else error!r}"
        ) from error
    optional = (UNUSED, POOLER) if task == "embedding" else (UNUSED,)
    missing = [name for name in told["missing_keys"] if not any(part in name for part in optional)]
    missing += [name for name, *_ in told["mismatched_keys"]]
    if missing:
        raise ConfigError(
            f"base.task: as a model for {task}, {found.model_path} lacks trained weights for "
            f"{', '.join(sorted(missing)[:SHOWN])}; its config.json says it was saved as "
            f"{found.architecture or 'nothing in particular'}"
        )
    if model.main_input_name != INPUTS[task]:
        raise ConfigError(
            f"base.transformers: {found.model_path} takes {model.main_input_name}; served are models that take texts "
            "(input_ids) to classes or to embeddings, and images (pixel_values) to classes. Build it in a module of "
            "your own and bring it with base.python"
        )
    loaded: nn.Module = model
    return loaded


def _loader(found: TransformersFolder, task: Task) -> Any:
    """The library's class that loads a model for a task."""
    make_torchvision_importable()
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ConfigError("base.transformers needs the extra 'text': pip install 'leanserve[text]'") from error
    if task == "text classification":
        return transformers.AutoModelForSequenceClassification
    if task == "image classification":
        return transformers.AutoModelForImageClassification
    return getattr(transformers, ENCODERS.get(found.config.get("model_type", ""), "AutoModel"))


@contextmanager
def _silent() -> Iterator[None]:
    """Without the library's progress bars and its table of unused weights, which is checked here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
