"""CONTRIBUTING's recipe "Add an endpoint", followed to the letter on a copy of the source."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from textwrap import dedent

import pytest

from rule_service import serving

ROOT = Path(__file__).parent.parent.parent
RECIPE = (ROOT / "CONTRIBUTING.md").read_text().partition("### Add an endpoint\n")[2].partition("\n### ")[0]
ROW = {"inputs": [[0, 0, 0, 0], [0, 0, 255, 0]]}


def blocks(language: str) -> list[str]:
    """The code of the recipe in that language."""
    return [dedent(found) for found in re.findall(rf"```{language}\n(.*?)```", RECIPE, re.DOTALL)]


def named_paths() -> list[Path]:
    return [Path(found) for found in re.findall(r"`(service/leanserve/\S+\.py)`", RECIPE)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The copy, with the file and the rows of the recipe."""
    shutil.copytree(ROOT / "service", tmp_path / "service", ignore=shutil.ignore_patterns("__pycache__"))
    (written,), (added, table) = blocks("python"), named_paths()
    assert not (tmp_path / added).exists()
    (tmp_path / added).write_text(written)
    text = (tmp_path / table).read_text()
    for rows in blocks("diff"):
        before, after = _sides(rows)
        assert text.count(before) == 1, f"{table} has changed: {before!r}"
        text = text.replace(before, after)
    (tmp_path / table).write_text(text)
    return tmp_path / "service"


def _sides(rows: str) -> tuple[str, str]:
    """The lines that stand there, and those with what is added."""
    lines = rows.splitlines(keepends=True)
    old, new = ([line[1:] for line in lines if line[0] in kinds] for kinds in (" ", " +"))
    return "".join(old), "".join(new)


def test_the_endpoint_answers_is_described_and_counted(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(source))
    with serving(tmp_path / "rules", "rule", "rule2") as service:
        reply = service.http.post("/v1/label", json=ROW, headers={"x-variant": "rule", "x-request-id": "mine"})
        assert (reply.status_code, reply.text, reply.headers["x-request-id"]) == (200, "g", "mine")
        refused = service.http.post("/v1/label", json={"inputs": 1}, headers={"x-variant": "rule"})
        assert (refused.status_code, refused.json()["code"]) == (400, "bad_input")
        assert service.http.get("/v1/label").status_code == 405
        told = service.get("/openapi.json")["paths"]["/v1/label"]["post"]
        assert told["summary"] == "The best label, as plain text"
        assert [item["name"] for item in told["parameters"]] == ["x-variant", "x-caller-key"]
        assert service.metric("nv_inference_request_success", version="rule") == 1
        assert service.metric("nv_inference_request_failure", version="rule") == 1
        assert service.executed("rule") == (1, 1)
        assert service.http.post("/v1/predict", json=ROW).json()["label"] == "g", "what was there still answers"
