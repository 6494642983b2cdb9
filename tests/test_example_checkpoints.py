"""The examples `timm-checkpoint` and `transformers-checkpoint`: made, built and asked as their READMEs say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from test_end_to_end import start, stop

from leanserve.config.schema import read_config

EXAMPLES = Path(__file__).parent.parent / "examples"
KEPT = {"timm-checkpoint": ("float", "int8"), "transformers-checkpoint": ("float", "int8")}


class Running(NamedTuple):
    """A served example, cut down to two variants."""

    name: str
    folder: Path
    url: str


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.soak) for name in KEPT])
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    name: str = request.param
    folder = tmp_path_factory.mktemp(name)
    for path in EXAMPLES.joinpath(name).glob("*.*"):
        shutil.copy(path, folder)
    command = [sys.executable, "make_checkpoint.py", str(folder), "--epochs", "4"]
    subprocess.run(command, cwd=folder, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    head, *variants = (folder / "config.yaml").read_text().split("  - name: ")
    kept = [text for text in variants if text.split()[0] in KEPT[name]]
    assert len(kept) == len(KEPT[name])
    (folder / "config.yaml").write_text("  - name: ".join([head, *kept]).replace("exclude", "abort"))
    service = start(folder / "config.yaml", folder / "cache", folder / "log", within=280)
    yield Running(name, folder, service.url)
    assert stop(service) == 0


def asked(running: Running, variant: str) -> list[tuple[str, str]]:
    """Some rows of the example's own data: the label they carry, and the one that is answered."""
    found = []
    for body, media_type, label in rows(running):
        headers = {"content-type": media_type, "x-variant": variant}
        reply = httpx.post(f"{running.url}/v1/predict", content=body, headers=headers)
        assert reply.status_code == 200, reply.text
        found.append((label, reply.json()["label"]))
    return found


def rows(running: Running) -> list[tuple[bytes, str, str]]:
    if running.name == "timm-checkpoint":
        images = sorted(running.folder.glob("photos/gate/*/*.png"))[::10]
        return [(path.read_bytes(), "image/png", path.parent.name) for path in images]
    lines = (running.folder / "reviews.csv").read_text().splitlines()[-40:]
    pairs = [line.rpartition(",") for line in lines]
    return [(text.strip('"').encode(), "text/plain", label) for text, _, label in pairs]


@pytest.mark.parametrize("variant", ["float", "int8"])
def test_answers_are_right(running: Running, variant: str) -> None:
    answers = asked(running, variant)
    assert sum(given == wanted for wanted, given in answers) > 0.8 * len(answers), answers


def test_variants_were_compared_on_labelled_rows(running: Running) -> None:
    listed = httpx.get(f"{running.url}/v1/variants").json()["variants"]
    assert {item["name"]: item["state"] for item in listed} == dict.fromkeys(KEPT[running.name], "serving")
    assert all(item["quality"]["score"] > 0.8 for item in listed)
    assert listed[1]["quality"]["disk_bytes"] < 0.6 * listed[0]["quality"]["disk_bytes"]


@pytest.mark.parametrize("name", KEPT)
def test_the_whole_config_is_valid_and_short(name: str) -> None:
    path = EXAMPLES / name / "config.yaml"
    assert len(path.read_text().splitlines()) < 30
    assert len(read_config(path).variants) == 5
