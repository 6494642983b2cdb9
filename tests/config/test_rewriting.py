"""The section `traffic` of a config file, rewritten: all other lines stay, and what would be wrong is never written."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanserve.config.rewriting import write_traffic
from leanserve.config.schema import read_config
from leanserve.errors import ConfigError

HEAD = "# mine\nbase: digits\nvariants: [{name: a}, {name: b}]  # two\n"
OLD = "traffic:\n  weights: {a: 9, b: 1}  # lost\n  sticky_header: x-me\n"
AFTER = "\n# of the drain\ndrain: {delay_s: 1}\n"


@pytest.mark.parametrize("before", [HEAD, HEAD + OLD, HEAD + OLD + AFTER, OLD + AFTER + HEAD, HEAD.rstrip("\n")])
def test_only_the_section_changes(tmp_path: Path, before: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(before)
    path.chmod(0o640)
    write_traffic(path, {"b": 1.0}, {"b": 50.0})
    after, config = path.read_text(), read_config(path)
    assert (config.traffic.weights, config.traffic.caps) == ({"b": 1.0}, {"b": 50.0})
    assert config.traffic.sticky_header == ("x-me" if OLD in before else "x-caller-key")
    for part in (HEAD.rstrip("\n"), AFTER):
        assert (part in after) == (part in before)
    assert path.stat().st_mode & 0o777 == 0o640
    assert [*tmp_path.iterdir()] == [path]


def test_nothing_is_left_of_a_section_without_weights_and_caps(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(HEAD + "traffic: {weights: {a: 1}}\n" + AFTER)
    write_traffic(path, {}, {})
    assert path.read_text() == HEAD + AFTER


def test_what_would_be_wrong_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(HEAD)
    with pytest.raises(ConfigError, match="names 'c'"):
        write_traffic(path, {"c": 1.0}, {})
    assert path.read_text() == HEAD
    assert [*tmp_path.iterdir()] == [path]
    path.write_text("{base: digits, variants: [{name: a}]}")
    with pytest.raises(ConfigError, match="a line per key"):
        write_traffic(path, {"a": 1.0}, {})
