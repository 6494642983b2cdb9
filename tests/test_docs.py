"""Documentation is tested against the code: passes, options, config keys, commands, error codes, dependencies."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from leanserve.__main__ import app
from leanserve.codecs.postprocess import STEPS
from leanserve.codecs.postprocess.step import PostStep
from leanserve.config.errors import KINDS
from leanserve.config.schema import ServiceConfig
from leanserve.passes import ALL
from leanserve.passes.base import Pass

ROOT = Path(__file__).parent.parent
DOCS = {
    name: (ROOT / "docs" / name).read_text()
    for name in ("answers.md", "config.md", "passes.md", "request-path.md", "metrics.md")
}
README = (ROOT / "README.md").read_text()


def section(text: str, heading: str) -> str:
    """The text below a heading, up to the next one of the same or a higher level."""
    level = heading.partition(" ")[0]
    _, found, rest = text.partition(f"\n{heading}\n")
    assert found, f"no heading '{heading}'"
    return re.split(rf"\n#{{1,{len(level)}}} ", rest, maxsplit=1)[0]


@pytest.mark.parametrize("pass_", ALL, ids=lambda pass_: pass_.__name__)
def test_every_pass_and_option_is_documented(pass_: type[Pass]) -> None:
    kind = next(name for name, known in KINDS.items() if known is pass_)
    text = section(DOCS["passes.md"], f"### `{kind}`")
    for option in pass_.model_fields:
        assert option == "kind" or f"| `{option}` |" in text, f"option '{option}' of {kind} is missing"
    assert "Measured" in text, f"{kind} ships without a number"


def test_no_pass_is_documented_that_does_not_exist() -> None:
    assert set(re.findall(r"^### `(\w+)`", DOCS["passes.md"], re.MULTILINE)) == set(KINDS)


@pytest.mark.parametrize("kind", STEPS)
def test_every_step_of_post_processing_is_documented(kind: str) -> None:
    heading = next(line for line in DOCS["answers.md"].splitlines() if line.startswith("### ") and f"`{kind}`" in line)
    text = section(DOCS["answers.md"], "## Post-processing").partition("\n### ")[0] + section(
        DOCS["answers.md"], heading
    )
    for option in STEPS[kind].model_fields:
        assert f"| `{option}` |" in text, f"option '{option}' of {kind} is missing"


def models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [] if issubclass(annotation, Pass | PostStep) else [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def test_every_config_key_is_documented() -> None:
    waiting: list[type[BaseModel]] = [ServiceConfig]
    while waiting:
        model = waiting.pop()
        for name, info in model.model_fields.items():
            assert f"| `{name}` |" in DOCS["config.md"], f"{model.__name__}.{name}"
            waiting += models_in(info.annotation)


def test_every_command_is_documented() -> None:
    commands = [command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands]
    assert set(re.findall(r"^### `leanserve (\w+)`", DOCS["config.md"], re.MULTILINE)) == set(commands)


def test_every_error_code_is_documented() -> None:
    from leanserve.telemetry.observations import OUTCOMES

    for code in set(OUTCOMES) - {"ok", "internal", "client_gone"}:
        assert f"`{code}`" in DOCS["request-path.md"]


def test_every_dependency_has_its_reason_in_the_readme() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for names in project["optional-dependencies"].values() for name in names]
    table = section(README, "## Dependencies")
    for requirement in [*project["dependencies"], *extras]:
        name = re.split(r"[\[<>=; ]", requirement)[0]
        if name != "leanserve":
            assert re.search(rf"`{re.escape(name)}`", table), f"{name} has no reason"


def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    commands = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    python = [shlex.split(line)[1:] for line in commands if line.startswith(".venv/bin/python ")]
    assert python
    for arguments in python:
        subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            check=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))},
        )
    assert (tmp_path / "digit.png").exists()
    for line in commands:
        words = shlex.split(line, comments=True)
        if words[:1] == ["leanserve"]:
            done = subprocess.run(
                [sys.executable, "-m", "leanserve", words[1], "--help"], capture_output=True, check=True
            )
            for option in (word for word in words if word.startswith("--")):
                assert option in re.sub(r"\x1b\[[0-9;]*m", "", done.stdout.decode()), f"{line}: no option {option}"


def test_links_and_make_targets_in_the_docs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text()
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
            assert "://" in target or (path.parent / target).exists(), f"{path.name} links to {target}"
        for target in re.findall(r"^make ([a-z-]+)", text, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{path.name}: make {target}"
