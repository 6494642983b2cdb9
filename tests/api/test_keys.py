"""Keys from the config, files and the environment: what is told of wrong ones, and never the key itself."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from leanserve.__main__ import app
from leanserve.api.access import Access
from leanserve.api.keys import keys_of
from leanserve.config.schema import read_config
from leanserve.errors import ConfigError, Unauthorized

SECRET = "a secret of 16 characters or more".replace(" ", "-")
SHA = "0" * 64


def keys(folder: Path, declared: Any, environ: Mapping[str, str] = {}) -> Any:
    path = folder / "leanserve.yaml"
    path.write_text(
        "base: digits\nvariants: [{name: a}]\nauth:\n  keys:\n    - "
        + yaml.safe_dump(declared, default_flow_style=True, width=999)
    )
    return keys_of(read_config(path).auth, path, environ)


def test_all_three_places(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(SECRET + "\n")
    made = CliRunner().invoke(app, ["key", "ops", "--role", "admin"])
    (line,) = yaml.safe_load(made.stdout)
    shown = next(word for word in made.stderr.split() if word.startswith("lsk_"))
    for declared, environ, text in (
        ({"name": "a", "roles": ["read"], "file": "key"}, {}, SECRET),
        ({"name": "a", "roles": ["read"], "env": "KEY"}, {"KEY": SECRET}, SECRET),
        (line | {"roles": ["read"]}, {}, shown),
    ):
        access = Access(keys(tmp_path, declared, environ))
        assert access.admit("read", {b"x-api-key": text.encode()}) == declared["name"]
        with pytest.raises(Unauthorized):
            access.admit("read", {b"x-api-key": text[:-1].encode()})
    assert shown not in made.stdout


@pytest.mark.parametrize(
    ("declared", "environ", "text"),
    [
        ({"env": "KEY"}, {}, r"leanserve.yaml:5: auth.keys: key 'a': the environment variable KEY is not set or empty"),
        ({"env": "KEY"}, {"KEY": "short"}, "the environment variable KEY must hold 16 or more"),
        ({"env": "KEY"}, {"KEY": "ü" * 20}, "must hold 16 or more printable ASCII"),
        ({"file": "none"}, {}, r"the file .*none cannot be read: No such file"),
        ({"file": "."}, {}, "cannot be read: not a regular file"),
        ({"file": "/dev/zero"}, {}, "cannot be read: not a regular file"),
        ({"file": "empty"}, {}, "empty is not set or empty"),
        ({"file": "binary"}, {}, "holds no key: it is not plain text"),
        ({"sha256": SECRET}, {}, "this is no sha256"),
        ({"sha256": 12345678901234567890}, {}, "sha256: must be a text"),
        ({}, {}, "a key has one of 'sha256', 'env' and 'file'"),
        ({"sha256": SHA, "env": "KEY"}, {"KEY": SECRET}, "a key has one of"),
        ({"sha256": SHA, "burst": 3}, {}, "'burst' has no effect without 'rate_per_s'"),
        ({"sha256": SHA, "rate_per_s": 0}, {}, "rate_per_s"),
        ({"sha256": SHA, "roles": []}, {}, "roles: must have at least 1 entry"),
        ({"sha256": SHA, "roles": ["root"]}, {}, "'predict', 'read' or 'admin'"),
        ({"sha256": SHA, "key": SECRET}, {}, "unknown key 'key'"),
    ],
)
def test_wrong_ones_are_one_line_and_no_secret(
    tmp_path: Path, declared: dict[str, Any], environ: dict[str, str], text: str
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match=text) as refused:
        keys(tmp_path, {"name": "a", "roles": ["read"]} | declared, environ)
    said = str(refused.value)
    assert "\n" not in said
    assert not any(secret in said for secret in (SECRET, "short'", "12345678901234567890", "ü"))


def test_one_key_has_one_name(tmp_path: Path) -> None:
    path = tmp_path / "leanserve.yaml"
    both = [{"name": name, "roles": ["read"], "sha256": SHA} for name in ("a", "b")]
    path.write_text(yaml.safe_dump({"base": "digits", "variants": [{"name": "a"}], "auth": {"keys": both}}))
    with pytest.raises(ConfigError, match="key 'b': it is the same key as that of 'a'"):
        keys_of(read_config(path).auth, path, {})
    path.write_text(path.read_text().replace("name: b", "name: a"))
    with pytest.raises(ConfigError, match="the name 'a' is used twice"):
        read_config(path)


def test_the_command_writes_a_file_for_its_owner_only(tmp_path: Path) -> None:
    at = tmp_path / "ops.key"
    made = CliRunner().invoke(app, ["key", "ops", "--role", "read", "--role", "admin", "--output", str(at)])
    assert made.exit_code == 0
    assert stat.S_IMODE(at.stat().st_mode) == 0o600
    assert at.read_text().strip() not in made.output
    assert "roles: [read, admin]" in made.stdout
    before = at.read_bytes()
    again = CliRunner().invoke(app, ["key", "ops", "--output", str(at)])
    assert "File exists; choose another --output" in str(again.exception)
    assert at.read_bytes() == before
    assert "Input should be 'predict'" in str(CliRunner().invoke(app, ["key", "ops", "--role", "root"]).exception)
    assert "a name is 1-63" in str(CliRunner().invoke(app, ["key", "-", "--role", "read"]).exception)


def test_a_service_that_others_reach_needs_a_key_to_be_controlled(tmp_path: Path) -> None:
    path = tmp_path / "leanserve.yaml"
    path.write_text("base: digits\nvariants: [{name: a}]\nmodel_control: explicit\n")
    refused = CliRunner().invoke(app, ["serve", "--config", str(path), "--host", "0.0.0.0", "--port", str(_free())])
    assert "name a key of the role admin under auth.keys" in str(refused.exception)


def _free() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def test_only_the_owner_reads_a_key(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (tmp_path / "key").write_text(SECRET)
    (tmp_path / "key").chmod(0)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        keys(tmp_path, {"name": "a", "roles": ["read"], "file": "key"})
