"""JSON documents that are believed only if they are, to the byte, what was written, and about what is asked.

A flipped byte in a number is still a number, and a file copied from elsewhere reads well. So a document is stored with
the key of what it speaks of and a checksum over both. That keeps out damage and mix-ups; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from leanserve.contracts import Json
from leanserve.disk import open_regular
from leanserve.errors import ArtifactCorrupt

Document = TypeVar("Document", bound=BaseModel)


class _Sealed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    key: str
    document: str


def seal(path: Path, key: str, document: BaseModel) -> None:
    """Write a document about `key` and flush it to the disk.

    Raises:
        ValueError: a number in it is infinite or NaN, which JSON does not have; the text names it.
    """
    content = document.model_dump(mode="python")
    for name, value in _numbers("", content):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}, and JSON has neither infinities nor NaN")
    text = document.model_dump_json()
    sealed = _Sealed(sha256=_checksum(key, text), key=key, document=text)
    with path.open("w", encoding="utf-8") as stream:
        stream.write(sealed.model_dump_json())
        stream.flush()
        os.fsync(stream.fileno())


def unseal(path: Path, key: str, kind: type[Document]) -> Document:
    """The document about `key` in a file.

    Raises:
        ArtifactCorrupt: it is missing, no regular file, damaged, of another version, or about something else.
    """
    try:
        with open_regular(path) as stream:
            sealed = _Sealed.model_validate_json(stream.read())
    except OSError as error:
        raise ArtifactCorrupt(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise ArtifactCorrupt(f"{path}: is not a document of leanserve") from error
    if _checksum(sealed.key, sealed.document) != sealed.sha256:
        raise ArtifactCorrupt(f"{path}: does not match its checksum")
    if sealed.key != key:
        raise ArtifactCorrupt(f"{path}: belongs to {sealed.key[:12]}, not to {key[:12]}; it was copied here")
    try:
        return kind.model_validate(json.loads(sealed.document))
    except ValidationError as error:
        raise ArtifactCorrupt(f"{path}: was written by another version of leanserve") from error


def _checksum(key: str, text: str) -> str:
    return hashlib.sha256(f"{key}\n{text}".encode()).hexdigest()


def _numbers(name: str, value: Json) -> Iterator[tuple[str, float]]:
    """Every float in nested mappings and sequences, with the path to it."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _numbers(f"{name}[{index}]", item)
