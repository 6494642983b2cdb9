"""From the config to the keys that open the service: read from files and the environment at its start and by SIGHUP.

What stays in memory is a digest. A fast one is enough: a key is 256 random bits, which nobody finds by trying.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from leanserve.api.access import Key
from leanserve.config.auth_section import AuthConfig, KeyConfig
from leanserve.config.yaml import read_yaml
from leanserve.disk import open_regular
from leanserve.errors import ConfigError, StartupError
from leanserve.token_bucket import TokenBucket

LEAST_LENGTH = 16
"""Characters of a key that somebody chose; shorter ones can be found by trying."""
_MOST_BYTES = 4096
PREFIX = "lsk_"
"""By which scanners of repositories and logs know a key."""


def new_key() -> str:
    """A key nobody else has: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of_key(key: str) -> str:
    """What stands in the config instead of the key."""
    return hashlib.sha256(key.encode()).hexdigest()


def line_of_config(key: str, name: str, roles: Sequence[str]) -> str:
    """The line below `auth.keys` that admits a key.

    Raises:
        ConfigError: no such role, or a name that is none.
    """
    try:
        KeyConfig.model_validate({"name": name, "roles": roles, "sha256": digest_of_key(key)})
    except ValidationError as error:
        raise ConfigError("; ".join(item["msg"].removeprefix("Value error, ") for item in error.errors())) from None
    return f"- {{name: {name}, roles: [{', '.join(roles)}], sha256: {digest_of_key(key)}}}"


def write_key(key: str, path: Path) -> None:
    """Write a key into a new file that its owner alone may read.

    Raises:
        StartupError: it is there already, or cannot be made.
    """
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as stream:
            stream.write(key + "\n")
    except OSError as error:
        raise StartupError(f"{path}: the key is not written: {error.strerror}; choose another --output") from None


def keys_of(auth: AuthConfig, path: Path, environ: Mapping[str, str]) -> tuple[Key, ...]:
    """The keys of the config file at `path`.

    Raises:
        ConfigError: one is not where the config says, is too short, or is the same as another; never tells a key.
    """
    found: list[Key] = []
    for position, declared in enumerate(auth.keys):
        try:
            digest = bytes.fromhex(declared.sha256 or digest_of_key(_key(declared, path.parent, environ)))
            if same := next((key.name for key in found if key.digest == digest), None):
                raise ValueError(f"it is the same key as that of '{same}'; make one for each")
        except (OSError, ValueError) as error:
            place = read_yaml(path).place(("auth", "keys", position))
            text = getattr(error, "strerror", None) or error
            raise ConfigError(f"{place}: auth.keys: key '{declared.name}': {text}") from None
        rate = declared.rate_per_s
        bucket = None if rate is None else TokenBucket(rate, declared.most_at_once)
        found.append(Key(declared.name, digest, frozenset(declared.roles), bucket))
    return tuple(found)


def _key(declared: KeyConfig, folder: Path, environ: Mapping[str, str]) -> str:
    if declared.file is None:
        key, where = environ.get(declared.env or "", ""), f"the environment variable {declared.env}"
    else:
        where = f"the file {folder / declared.file}"
        try:
            with open_regular(folder / declared.file) as stream:
                key = stream.read(_MOST_BYTES).decode("ascii").strip()
        except UnicodeDecodeError:
            raise ValueError(f"{where} holds no key: it is not plain text") from None
        except OSError as error:
            raise ValueError(f"{where} cannot be read: {error.strerror}") from None
    if not key:
        raise ValueError(f"{where} is not set or empty")
    if len(key) < LEAST_LENGTH or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"{where} must hold {LEAST_LENGTH} or more printable ASCII characters; `leanserve key` makes one"
        )
    return key
