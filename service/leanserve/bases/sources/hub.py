"""Files from the Hugging Face hub: whoever names a model there gets it once, and never any code with it.

The local cache is asked first and without the network, so that a start does not depend on somebody else's server and
what was served yesterday is served today. Only weights without code (safetensors) and plain text are fetched; pickles
and Python files stay where they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

from leanserve.errors import ConfigError

ENDINGS = (".safetensors", ".json", ".txt", ".model")
"""Of files that can be read without running any code."""

REPOSITORY = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)
"""`model` or `owner/model`."""


def is_repository(name: str) -> bool:
    """Whether this could be a model's name on the hub."""
    return REPOSITORY.fullmatch(name) is not None


def hub_file(repo: str, filename: str, key: str = "base.weights") -> Path:
    """One file of a repository, from the local cache or downloaded into it. `key` is the config key that names it.

    Raises:
        ConfigError: it cannot be had, or is of a kind that is never fetched.
    """
    _refuse(repo, (filename,), key)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, filename, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        pass  # no name for the hub, or not downloaded yet: downloading tells
    try:
        return Path(hf_hub_download(repo, filename))
    except Exception as error:  # network libraries raise errors of many families
        raise _unavailable(repo, f"the file {filename}", key, error) from error


def hub_folder(repo: str, patterns: Sequence[str], needed: Sequence[str] = (), key: str = "base.transformers") -> Path:
    """The folder with those files of a repository that match one of the patterns.

    It comes from the local cache if every pattern of `needed` matches a file there, else it is downloaded.

    Raises:
        ConfigError: it cannot be had, nothing matches a needed pattern, or a pattern asks for what is never fetched.
    """
    _refuse(repo, patterns, key)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(repo, allow_patterns=list(patterns), local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        cached = None
    if cached is not None and not _missing(cached, needed):
        return cached
    try:
        folder = Path(snapshot_download(repo, allow_patterns=list(patterns)))
    except Exception as error:  # network libraries raise errors of many families
        raise _unavailable(repo, "the model", key, error) from error
    if missing := _missing(folder, needed):
        raise ConfigError(
            f"{key}: '{repo}' has no {' and no '.join(missing)}, neither on the hub nor, if that is out of reach, in "
            f"{folder}. Weights are read as safetensors only (save_pretrained writes them)"
        )
    return folder


def _missing(folder: Path, needed: Sequence[str]) -> list[str]:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    return [pattern for pattern in needed if not any(fnmatchcase(name, pattern) for name in names)]


def _refuse(repo: str, patterns: Sequence[str], key: str) -> None:
    """What cannot be asked for, or not without the library."""
    if not is_repository(repo):
        raise ConfigError(f"{key}: '{repo}' is no name of a model on the hub; those look like owner/model")
    for pattern in patterns:
        if not pattern.endswith(ENDINGS):
            raise ConfigError(
                f"{key}: {pattern} of {repo} is not fetched: only {', '.join(ENDINGS)} are read without running code"
            )
    if find_spec("huggingface_hub") is None:
        raise ConfigError(f"{key}: the hub needs the extra 'text' or 'vision': pip install 'leanserve[text]'")


def _unavailable(repo: str, what: str, key: str, error: Exception) -> ConfigError:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    if isinstance(error, RepositoryNotFoundError):
        return ConfigError(f"{key}: the hub has no model '{repo}', or shows it only with a token (set HF_TOKEN)")
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return ConfigError(f"{key}: '{repo}' on the hub does not have {what}")
    text = str(error).splitlines()
    return ConfigError(
        f"{key}: {what} of '{repo}' is not in the local cache and could not be downloaded "
        f"({type(error).__name__}: {text[0] if text else 'no reason given'}). Download it once on a machine with "
        "network (`hf download`), copy the cache and point HF_HOME at it, or give the path of a local copy"
    )
