"""JSON documents that are believed only if they are, to the byte, what was written, and about what is asked.

A flipped byte in a number is still a number, and a file copied from elsewhere reads well. So a document stands in its
file with the key of what it speaks of and a checksum over all of the file, in which the place of the checksum itself is
filled with zeros. One file holds all three, because only one can be replaced in one step. That keeps out damage and
mix-ups; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from leanserve.contracts import Json
from leanserve.disk import open_regular
from leanserve.errors import ArtifactCorrupt

Document = TypeVar("Document", bound=BaseModel)
BLANK = b"0" * 64
_CHECKSUM = re.compile(rb'(?<="sha256": ")[0-9a-f]{64}(?=")')


class _Sealed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    key: str
    document: Any


def seal(path: Path, key: str, document: BaseModel) -> None:
    """Write a document about `key` and flush it to the disk.

    Raises:
        ValueError: a number in it is infinite or NaN, which JSON does not have; the text names it.
    """
    for name, value in _numbers("", document.model_dump(mode="python")):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}, and JSON has neither infinities nor NaN")
    sealed = _Sealed(sha256=BLANK.decode(), key=key, document=document.model_dump(mode="json"))
    blank = json.dumps(sealed.model_dump(), indent=1).encode() + b"\n"
    with path.open("wb") as stream:
        stream.write(_CHECKSUM.sub(_digest(blank), blank, count=1))
        stream.flush()
        os.fsync(stream.fileno())


def unseal(path: Path, key: str, kind: type[Document]) -> Document:
    """The document about `key` in a file.

    Raises:
        ArtifactCorrupt: it is missing, no regular file, damaged, of another version, or about something else.
    """
    try:
        with open_regular(path) as stream:
            text = stream.read()
        sealed = _Sealed.model_validate_json(text)
    except OSError as error:
        raise ArtifactCorrupt(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise ArtifactCorrupt(f"{path}: is not a document of leanserve") from error
    if _digest(_CHECKSUM.sub(BLANK, text, count=1)) != sealed.sha256.encode():
        raise ArtifactCorrupt(f"{path}: does not match its checksum")
    if sealed.key != key:
        raise ArtifactCorrupt(f"{path}: belongs to {sealed.key[:12]}, not to {key[:12]}; it was copied here")
    try:
        return kind.model_validate(sealed.document)
    except ValidationError as error:
        raise ArtifactCorrupt(f"{path}: was written by another version of leanserve") from error


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


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
