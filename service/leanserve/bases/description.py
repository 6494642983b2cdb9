"""What only a model itself can tell, found out once: its tensors, its labels, how its requests are prepared.

Finding out may import torch and timm and run the model; the answer is a small JSON document, remembered in the cache
folder under the fingerprint of what was brought, so that the next start asks nobody.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from leanserve.artifacts.sealed import seal, unseal
from leanserve.config.base_section import AudioInput, ImageInput, TextInput
from leanserve.contracts import Meaning, ModelSpec, RowsTogether, TensorSpec
from leanserve.disk import may_write
from leanserve.errors import ArtifactCorrupt, ConfigError

logger = logging.getLogger(__name__)

FORMAT = 5
"""Raise when descriptions of the same model come out differently."""
Evidence = Literal["declared", "operator", "numbers", "name", "labels", "form", "none"]
"""From what the meaning of an output is known: the config, its last operator, what it looked like on random rows, its
name, that it has as many numbers as there are labels, the kind of base it belongs to; or nothing is known."""


class Tensor(BaseModel):
    """A `contracts.TensorSpec` as JSON. An output may have no name before `bases.meanings.settled` gave it one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    pad: float = 0.0
    meaning: Meaning = "values"
    evidence: Evidence = "none"
    next_from: str | None = None
    words: tuple[tuple[str, ...], ...] = ()

    def field(self) -> TensorSpec:
        """As the contracts know it."""
        return TensorSpec(
            self.name,
            self.dtype,
            self.shape,
            self.pad,
            meaning=self.meaning,
            next_from=self.next_from,
            words=self.words,
        )


class Probed(BaseModel):
    """What was found out about a model by running it: sizes as in `Description`, outputs that may have no name yet."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    step: int = 1
    least: int = 1
    max_length: int = 512
    caveats: tuple[str, ...] = ()


class Description(BaseModel):
    """What a brought model takes and gives, and how requests and data are prepared for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Under which it is served unless the config says otherwise."""
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    labels: tuple[str, ...] = ()
    labelled: int = 0
    """Position of the output whose classes the labels name."""
    image: ImageInput | None = None
    text: TextInput | None = None
    audio: AudioInput | None = None
    """Of the three, the one that says how a request becomes the inputs; none: arrays as they are."""
    max_length: int = 512
    """Longest dynamic axis that is served."""
    rows: RowsTogether = "any"
    """Which rows may share a batch."""
    step: int = 1
    """Sizes of dynamic axes are multiples of this."""
    least: int = 1
    """The smallest size of a dynamic axis."""
    caveats: tuple[str, ...] = ()
    """What everyone who sees a result must know, such as `untrained`."""

    def spec(self) -> ModelSpec:
        """The tensors and labels as the contracts know them."""
        return ModelSpec(
            tuple(item.field() for item in self.inputs),
            tuple(item.field() for item in self.outputs),
            self.labels,
            self.max_length,
            self.labelled,
            self.rows,
            self.step,
            self.least,
        )


def remembered(folder: Path | None, key: str, describe: Callable[[], Description]) -> Description:
    """The description with this key from the cache folder, else by asking and remembering (where that is possible).

    Raises:
        ConfigError: a number in the description is none that JSON has.
    """
    path = None if folder is None else folder / "bases" / f"{key}.{FORMAT}.json"
    if path is not None and os.path.lexists(path):
        try:
            found = unseal(path, key, Description)
            if found.text is None or found.text.tokenizer.is_file():
                return found
        except ArtifactCorrupt as error:
            logger.warning("damaged note is written again: %s", error)
    description = describe()
    if path is not None and may_write(path.parent):
        _remember(path, key, description)
    return description


def _remember(path: Path, key: str, description: Description) -> None:
    """Put it in its place in one step, whatever stands there. It can be found out again, so a full disk is no error."""
    half = path.parents[1] / "tmp" / f"{path.name}.{secrets.token_hex(8)}"  # the store sweeps what stays there
    try:
        for folder in (path.parent, half.parent):
            folder.mkdir(parents=True, exist_ok=True)
        seal(half, key, description)
        if path.is_dir():
            shutil.rmtree(path)
        half.replace(path)
    except ValueError as error:
        raise ConfigError(f"base: {error}") from error
    except OSError as error:
        logger.warning("what was found out about the base is not kept: %s", error)
    finally:
        half.unlink(missing_ok=True)
