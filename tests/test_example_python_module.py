"""The example `python-module`: a config of under thirty lines, five variants, the answers of the user's own torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_end_to_end import png, start, stop

from leanserve.config.schema import read_config

pytestmark = pytest.mark.soak
EXAMPLE = Path(__file__).parent.parent / "examples" / "python-module"
MEAN, STD = np.array((0.485, 0.456, 0.406), np.float32), np.array((0.229, 0.224, 0.225), np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its files made, but less of everything: one epoch, two variants, few rows to compare them on."""
    copy = tmp_path_factory.mktemp("example")
    for path in EXAMPLE.glob("*.*"):
        shutil.copy(path, copy)
    command = [sys.executable, "make_checkpoint.py", "--epochs", "1"]
    subprocess.run(command, cwd=copy, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    text = (copy / "config.yaml").read_text()
    shorter = text[: text.index("  - name: folded")] + text[text.index("  - name: int8") :]
    (copy / "config.yaml").write_text(shorter.replace("gate: 1000", "gate: 50"))
    return copy


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    service = start(folder / "config.yaml", folder / "cache", folder / "log", within=280)
    yield service.url
    assert stop(service) == 0


def network(folder: Path) -> torch.nn.Module:
    """The module as the user runs it, without the service."""
    spec = spec_from_file_location("resnet20", folder / "resnet20.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = module_from_spec(spec)
    spec.loader.exec_module(module)
    network: torch.nn.Module = module.resnet20()
    network.load_state_dict(load_file(folder / "resnet20.safetensors"))
    return network.eval()


def test_the_config_is_short_and_has_five_variants() -> None:
    assert len((EXAMPLE / "config.yaml").read_text().splitlines()) < 30
    assert len(read_config(EXAMPLE / "config.yaml").variants) == 5
    assert len((EXAMPLE / "smaller.yaml").read_text().splitlines()) < 30
    assert [item.name for item in read_config(EXAMPLE / "smaller.yaml").variants[1:]] == [
        "factors",
        "quarter",
        "shallower",
    ]


def test_answers_are_those_of_the_module(folder: Path, url: str) -> None:
    with np.load(folder / "images.npz") as stored:
        images = stored["images"][:24]
    rows = torch.from_numpy((images.astype(np.float32) / 255 - MEAN) / STD).permute(0, 3, 1, 2)
    with torch.inference_mode():
        shares = network(folder)(rows).softmax(dim=1).numpy()
    for variant, tolerance in (("float", 1e-5), ("int8", 0.2)):
        for image, expected in zip(images, shares, strict=True):
            headers = {"content-type": "image/png", "x-variant": variant}
            reply = httpx.post(f"{url}/v1/predict", content=png(image), headers=headers).json()
            assert reply["variant"] == variant
            found = [reply["scores"][str(label)] for label in range(10)]
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
