"""What may change in the file of a service that runs, and how a change is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from leanserve.config.changes import FIXED, config_changes, refuse_fixed
from leanserve.config.schema import ServiceConfig
from leanserve.errors import ConfigError

BEFORE: dict[str, Any] = {
    "base": "digits",
    "variants": [{"name": "a"}, {"name": "b", "passes": [{"kind": "fold_bn"}]}],
    "traffic": {"weights": {"a": 1}},
}
OTHER: dict[str, Any] = {
    "base": "minilm",
    "data": {"synthetic": 8},
    "seed": 1,
    "threads": 3,
    "lanes": 2,
    "cache": "elsewhere",
    "sequences": {"most": 7},
    "cors": {"origins": ["https://a.example"]},
    "auth": {"keys": [{"name": "k", "env": "K", "roles": ["predict"]}]},
    "tls": {"certificate": "c.pem", "key": "k.pem"},
    "postprocess": [],
}


def config(**changes: Any) -> ServiceConfig:
    return ServiceConfig.model_validate(BEFORE | changes)


def refused(path: Path, changes: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(BEFORE | changes, sort_keys=False))
    with pytest.raises(ConfigError) as error:
        refuse_fixed(path, config(), config(**changes))
    return str(error.value)


def test_what_may_change_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    changes = {
        "variants": [{"name": "c"}],
        "traffic": {},
        "gate": {"max_drop": 0.1},
        "limits": {"body_bytes": 9},
        "batch": {"queue_rows": 5},
        "drain": {"delay_s": 1},
        "isolation": "process",
        "model_control": "explicit",
    }
    path.write_text(yaml.safe_dump(BEFORE | changes))
    refuse_fixed(path, config(), config(**changes))


@pytest.mark.parametrize("key", ["base", "data", "seed", "threads", "lanes", "cache", "sequences", "cors"])
def test_what_cannot_change_is_refused_with_its_line_and_the_remedy(tmp_path: Path, key: str) -> None:
    path = tmp_path / "service.yaml"
    told = refused(path, {key: OTHER[key]})
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if text.startswith(f"{key}:"))
    assert told == f"{path}:{line}: '{key}' cannot change while the service runs ({FIXED[key]}); start it again"


def test_a_key_within_a_section_that_may_change_is_refused_by_its_name(tmp_path: Path) -> None:
    told = refused(tmp_path / "service.yaml", {"limits": {"body_bytes": 5, "decode_mb": 777}})
    assert "'limits.decode_mb' cannot change" in told
    assert "service.yaml:1:" not in told


def test_each_of_several_is_told(tmp_path: Path) -> None:
    told = refused(tmp_path / "service.yaml", {"seed": 1, "threads": 3})
    assert [line.partition("'")[2].partition("'")[0] for line in told.splitlines()] == ["seed", "threads"]


def test_every_section_may_change_or_is_said_to_be_fixed() -> None:
    """Whoever adds a section decides."""
    may_change = {
        "variants",
        "auth",
        "gate",
        "batch",
        "traffic",
        "limits",
        "experiment",
        "hardware",
        "embeddings",
        "drain",
        "isolation",
        "stuck_after_s",
        "on_sighup",
        "model_control",
    }
    assert may_change | {key for key in FIXED if "." not in key} == ServiceConfig.model_fields.keys()
    assert not may_change & FIXED.keys()


def test_differences_are_told_with_before_and_after() -> None:
    after = config(
        variants=[{"name": "a", "gate": {"max_drop": 0.5}}, {"name": "c"}],
        traffic={"weights": {"a": 3, "c": 1}},
        stuck_after_s=4,
    )
    told = config_changes(config(), after)
    assert told[0] == "stuck_after_s: 10.0 -> 4.0"
    assert told[1] == "traffic.weights: {'a': 1.0} -> {'a': 3.0, 'c': 1.0}"
    assert told[2].startswith("variant 'a': gate: none -> {'max_drop': 0.5")
    assert told[3:] == ["variant 'b' is removed", "variant 'c' is new"]
    assert config_changes(config(), config()) == []
