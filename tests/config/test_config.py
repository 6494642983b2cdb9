"""The config file: what is accepted, and that every mistake is one clear line with its place in the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanserve.config.schema import ServiceConfig, read_config
from leanserve.config.variant_section import BatchConfig, GateConfig
from leanserve.errors import ConfigError

GOOD = """\
base: digits
gate: {max_drop: 0.01}
variants:
  - name: float
  - name: int8
    passes:
      - {kind: fold_bn}
      - {kind: quantize_static}
      - {kind: onnxruntime}
    gate: {min_agreement: 0.9, on_fail: exclude}
traffic:
  weights: {float: 3, int8: 1}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "service.yaml"
    path.write_text(text)
    return path


def test_a_good_file_is_frozen_and_typed(tmp_path: Path) -> None:
    config = read_config(write(tmp_path, GOOD))
    assert [step.kind for step in config.variants[1].passes] == ["fold_bn", "quantize_static", "onnxruntime"]
    assert config.gate_of(config.variants[0]) == GateConfig(max_drop=0.01)
    assert config.gate_of(config.variants[1]) == GateConfig(min_agreement=0.9, on_fail="exclude")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def cors(settings: str) -> tuple[str, str]:
    return "traffic:", f"cors: {settings}\ntraffic:"


MISTAKES = {
    "origin with a path": (*cors("{origins: ['https://a.example/']}"), 11, "an origin is written as browsers send it"),
    "origin without a scheme": (*cors("{origins: [a.example]}"), 11, "https://app.example.com or http://localhost"),
    "origin in capitals": (*cors("{origins: ['https://A.example']}"), 11, "in lower case"),
    "origin with its own port": (*cors("{origins: ['https://a.example:443']}"), 11, "without the port that its scheme"),
    "origin of nobody": (*cors("{origins: ['null']}"), 11, "an origin is written as browsers send it"),
    "any origin and one": (*cors("{origins: ['*', 'https://a.example']}"), 11, "the origin '*' goes neither with"),
    "any origin's cookies": (*cors("{origins: ['*'], credentials: true}"), 11, "name the origins of your pages"),
    "no origin's cookies": (*cors("{credentials: true}"), 11, "without 'origins' nothing here has an effect"),
    "no header": (*cors("{origins: ['*'], headers: ['x y']}"), 11, "this is no name of a header"),
    "misspelt key": ("traffic:", "trafic:", 11, "unknown key 'trafic'; did you mean 'traffic'?"),
    "misspelt nested key": (
        "max_drop: 0.01",
        "max_dropp: 0.01",
        2,
        "unknown key 'max_dropp'; did you mean 'max_drop'?",
    ),
    "misspelt pass": ("kind: fold_bn", "kind: foldbn", 7, "unknown pass 'foldbn'; did you mean 'fold_bn'?"),
    "misspelt option": ("quantize_static}", "quantize_static, observr: mse}", 8, "did you mean 'observer'?"),
    "wrong option value": ("quantize_static}", "quantize_static, observer: best}", 8, "observer"),
    "pass written as text": ("{kind: fold_bn}", "fold_bn", 7, "a pass is written {kind: NAME"),
    "impossible order": (
        "      - {kind: quantize_static}\n      - {kind: onnxruntime}",
        "      - {kind: onnxruntime}\n      - {kind: quantize_static}",
        9,
        "'quantize_static' (precision) cannot come after 'onnxruntime' (layout and runtime)",
    ),
    "name used twice": ("name: int8", "name: float", 5, "the name 'float' is used twice"),
    "bad name": ("name: int8", "name: 'int 8'", 5, "a name is 1-63 letters"),
    "weight of a stranger": ("{float: 3,", "{flaot: 3,", 12, "names 'flaot', which is no variant"),
    "no weight at all": ("{float: 3, int8: 1}", "{float: 0, int8: 0}", 12, "at least one weight must be above 0"),
    "negative weight": ("float: 3", "float: -3", 12, "greater than or equal to 0"),
    "missing base": ("base: digits\n", "", 1, "the key 'base' is missing"),
    "key given twice": ("base: digits", "base: digits\nbase: other", 2, "key 'base' was given already on line 1"),
    "not YAML": ("base: digits", "base: [digits", 2, "not valid YAML"),
    "limit out of range": ("max_drop: 0.01", "max_drop: 5", 2, "(got 5)"),
    "default priority beyond the levels": (
        "base: digits",
        "base: digits\nbatch: {priority_levels: 2, default_priority: 3}",
        2,
        "default_priority 3 is beyond priority_levels 2",
    ),
    "default priority on a line of its own": (
        "base: digits",
        "base: digits\nbatch:\n  priority_levels: 2\n  default_priority: 3",
        4,
        "default_priority 3 is beyond priority_levels 2",
    ),
    "workers that outlive the service": (
        "base: digits",
        "base: digits\nisolation: process\nstuck_after_s: 60",
        3,
        "stuck_after_s is 60 and watchdog.batch_s 60: a batch that hangs in the worker of variant 'float'",
    ),
    "no room for a body": (
        "base: digits",
        "base: digits\nlimits: {body_bytes: 500000000}",
        2,
        "buffered_bytes (268435456) is less than body_bytes (500000000)",
    ),
    "no threads": ("base: digits", "base: digits\nthreads: 0", 2, "threads: must be at least 1 or 'auto' (got 0)"),
    "no lanes": ("base: digits", "base: digits\n\nlanes: 0", 3, "lanes: must be at least 1 or 'auto' (got 0)"),
    "lanes in words": (
        "base: digits",
        "base: digits\nlanes: many",
        2,
        "lanes: must be a whole number or 'auto' (got 'many')",
    ),
    "a truth value for a number": ("base: digits", "base: digits\nlanes: yes", 2, "must be a whole number or 'auto'"),
    "option that is a number or a word": (
        "{kind: onnxruntime}",
        "{kind: onnxruntime, threads: none}",
        9,
        "variants.1.passes.2.threads: must be a whole number or 'auto' (got 'none')",
    ),
    "labels that are neither a list nor a path": (
        "base: digits",
        "base:\n  python: a:b\n  labels: 5",
        3,
        "base.labels: must be a list or a path (got 5)",
    ),
    "one label that is no text": (
        "base: digits",
        "base:\n  python: a:b\n  labels:\n    - 7\n    - x",
        4,
        "base.labels.0: must be a text (got 7)",
    ),
    "input that is no mapping": (
        "base: digits",
        "base:\n  python: a:b\n  inputs:\n    x: 3",
        4,
        "base.inputs.x: must be a mapping with the keys dtype, shape (got 3)",
    ),
    "misspelt split": (
        "base: digits",
        "base: digits\ndata:\n  images:\n    gat: photos",
        4,
        "data.images.gat: unknown key 'gat'; did you mean 'gate'?",
    ),
    "column that is a list": ("base: digits", "base: digits\ndata: {texts: a.csv, text: [1]}", 2, "must be a text or"),
    "passes that are no list": (
        "passes:\n      - {kind: fold_bn}\n      - {kind: quantize_static}\n      - {kind: onnxruntime}",
        "passes: fold_bn",
        6,
        "variants.1.passes: must be a list (got 'fold_bn')",
    ),
    "gate in a word": (
        "{max_drop: 0.01}",
        "strict",
        2,
        "gate: must be a mapping with the keys max_drop, min_agreement",
    ),
    "wrong limit of a variant's gate": ("{min_agreement: 0.9,", "{min_agreement: most,", 10, "must be a number"),
}


@pytest.mark.parametrize(("wrong", "by", "line", "text"), MISTAKES.values(), ids=MISTAKES.keys())
def test_every_mistake_names_its_line_and_the_remedy(tmp_path: Path, wrong: str, by: str, line: int, text: str) -> None:
    assert wrong in GOOD
    path = write(tmp_path, GOOD.replace(wrong, by))
    with pytest.raises(ConfigError) as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}:{line}:")
    assert text in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_variant_may_be_called_like_a_pass(tmp_path: Path) -> None:
    text = GOOD.replace("name: int8", "name: distill").replace("{float: 3, int8: 1}", "\n    float: 3\n    distill: -1")
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}:14: traffic.weights.distill: ")


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("traffic:", "trafic:").replace("max_drop", "maxdrop")
    with pytest.raises(ConfigError) as error:
        read_config(write(tmp_path, text))
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text"])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="must be a mapping"):
        read_config(write(tmp_path, text))


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config"):
        read_config(tmp_path / "absent.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary.yaml:1: not UTF-8 .*; save the file in that encoding"):
        read_config(binary)


def test_the_shipped_config_is_valid_and_ships_the_promised_variants() -> None:
    config = read_config(Path("models/digits.yaml"))
    assert {"float", "onnx", "int8", "pruned", "pruned-int8"} <= {variant.name for variant in config.variants}


def test_the_schema_describes_every_pass() -> None:
    from leanserve.config.errors import KINDS

    schema = ServiceConfig.model_json_schema()
    mapping = schema["$defs"]["VariantConfig"]["properties"]["passes"]["items"]["discriminator"]["mapping"]
    assert set(mapping) == set(KINDS)
    assert schema["additionalProperties"] is False


def test_the_default_priority_is_the_middle_level() -> None:
    assert [BatchConfig(priority_levels=levels).default_level for levels in (1, 2, 3, 5)] == [1, 1, 2, 3]
    assert BatchConfig(priority_levels=5, default_priority=5).default_level == 5
