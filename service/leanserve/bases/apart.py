"""Describes a base in a process of its own, whose memory goes back when it ends.

To describe a model is to import its library, read it and run it. A server that has just begun would keep what that
takes for as long as it serves: some 30 MB of a small encoder, and of a model of timm all of torch and timm, even where
its variants need neither. The child prints one JSON line.
"""

from __future__ import annotations

import subprocess
import sys

from pydantic import BaseModel, ConfigDict, ValidationError

from leanserve import child
from leanserve.bases import time_limit
from leanserve.bases.description import Description
from leanserve.bases.origin import Origin, source_of
from leanserve.config.base_section import TorchExportBase
from leanserve.errors import ConfigError, StartupError
from leanserve.memory import bound_memory


class _Answer(BaseModel):
    """What the child found out, or why it could not."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    description: Description | None = None
    error: str = ""


def described_apart(origin: Origin) -> Description:
    """What `Source.describe` tells of a base.

    Raises:
        ConfigError: what the child could not find out, in its words.
        StartupError: the child ended without a word.
    """
    command = child.command("leanserve.bases.apart", origin.model_dump_json())
    # A program of a stranger ends here, whatever it does; models of libraries may be downloaded first.
    limit = time_limit.TRIAL_S if isinstance(origin.base, TorchExportBase) else None
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"base.torch_export: to look at the program does not end within {limit:g} s") from None
    try:
        answer = _Answer.model_validate_json(done.stdout.strip().rpartition("\n")[2])
    except ValidationError as error:
        ended = child.how_it_ended(done.returncode)
        raise StartupError(f"base: the process that looks at the model {ended}") from error
    if answer.description is None:
        raise ConfigError(answer.error)
    return answer.description


def main(request: str) -> None:
    """Describe the base of an `Origin` and print what was found out."""
    origin = Origin.model_validate_json(request)
    if isinstance(origin.base, TorchExportBase):
        bound_memory()
    try:
        answer = _Answer(description=source_of(origin).describe())
    except ConfigError as error:
        answer = _Answer(error=str(error))
    sys.stdout.write(answer.model_dump_json() + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
