"""What only a model itself can tell, found out once: its tensors, its labels, how its requests are prepared.

Finding out may import torch and timm and run the model; the answer is a small JSON document, remembered in the cache
folder under the fingerprint of what was brought, so that the next start asks nobody.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from service.bases.declaration import ImageInput, TextInput
from service.contracts import Field, InputSpec, RowsTogether

FORMAT = 2
"""Raise when descriptions of the same model come out differently."""


class Tensor(BaseModel):
    """A `contracts.Field` as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    pad: float = 0.0

    def field(self) -> Field:
        """As the contracts know it."""
        return Field(self.name, self.dtype, self.shape, self.pad)


class Description(BaseModel):
    """What a brought model takes and gives, and how requests and data are prepared for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Under which it is served unless the config says otherwise."""
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    labels: tuple[str, ...] = ()
    image: ImageInput | None = None
    text: TextInput | None = None
    """Of the two, the one that says how a request becomes the inputs; neither: arrays as they are."""
    max_length: int = 512
    """Longest dynamic axis that is served."""
    rows: RowsTogether = "any"
    """Which rows may share a batch."""
    caveats: tuple[str, ...] = ()
    """What everyone who sees a result must know, such as `untrained`."""

    def spec(self) -> InputSpec:
        """The tensors and labels as the contracts know them."""
        return InputSpec(
            tuple(item.field() for item in self.inputs),
            tuple(item.field() for item in self.outputs),
            self.labels,
            self.max_length,
            rows=self.rows,
        )


def remembered(folder: Path | None, fingerprint: str, describe: Callable[[], Description]) -> Description:
    """The description of this fingerprint from the cache folder, else by asking and remembering (unless no folder)."""
    path = None if folder is None else folder / "bases" / f"{fingerprint}.{FORMAT}.json"
    if path is not None and path.exists():
        try:
            found = Description.model_validate_json(path.read_bytes())
            if found.text is None or found.text.tokenizer.is_file():
                return found
        except ValidationError:
            pass  # damaged: found out again, as where the tokenizer has moved
    description = describe()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(f".{os.getpid()}")
        half.write_text(description.model_dump_json(indent=1), encoding="utf-8")
        half.replace(path)
    return description
