"""What a pass needs is asked for before any work, and what it does not need is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from leanserve import context
from leanserve.__main__ import app
from leanserve.build.needs import require_data, require_machine
from leanserve.config.schema import ServiceConfig
from leanserve.contracts import ArrayData, ModelSpec, RowsTogether, Split
from leanserve.errors import ConfigError, PassFailed, StartupError
from tiny_base import TinyBase, tiny_base


def config_of(*passes: Mapping[str, Any]) -> ServiceConfig:
    plain = {"name": "plain"}
    return ServiceConfig.model_validate({"base": "tiny", "variants": [plain, {"name": "v", "passes": passes}]})


@dataclass(frozen=True)
class Lacking(TinyBase):
    """A base without rows in one split: none at all, or no files for it."""

    split: Split = "train"
    files: bool = True

    def data(self, split: Split, n: int | None = None, spec: ModelSpec | None = None) -> ArrayData:
        if split == self.split and not self.files:
            raise ConfigError(f"data.arrays: there are no files for the split '{split}'")
        return super().data(split, 0 if split == self.split else n, spec)


def lacking(split: Split, *, files: bool = True) -> Lacking:
    base = tiny_base()
    return Lacking(base.teacher, base.inputs, base.labels, split=split, files=files)


@dataclass(frozen=True)
class Sharing(TinyBase):
    """A base whose files share rows."""

    def data(self, split: Split, n: int | None = None, spec: ModelSpec | None = None) -> ArrayData:
        raise ConfigError("data.texts: 6 rows of gate are also in another split")


def test_rows_that_cannot_be_split_are_the_reason_and_not_that_there_are_none() -> None:
    base = tiny_base()
    with pytest.raises(ConfigError, match="6 rows of gate are also in another split"):
        require_data(config_of({"kind": "distill"}), Sharing(base.teacher, base.inputs, base.labels))


FOLD, DISTILL = {"kind": "fold_bn"}, {"kind": "distill"}


@pytest.mark.parametrize("files", [True, False], ids=["no rows", "no files"])
@pytest.mark.parametrize(
    ("pass_", "split"),
    [
        (DISTILL, "train"),
        ({"kind": "distill", "patience": 3}, "calibration"),
        ({"kind": "prune_channels", "macs": 0.5}, "calibration"),
        ({"kind": "prune_channels", "macs": 0.5, "importance": "taylor"}, "train"),
        ({"kind": "prune_channels", "macs": 0.5, "steps": 2, "recovery": {}}, "train"),
        ({"kind": "lowrank_conv", "energy": 0.9}, "calibration"),
        ({"kind": "lowrank_linear", "energy": 0.9}, "calibration"),
        ({"kind": "smooth"}, "calibration"),
        ({"kind": "quantize_static"}, "calibration"),
        ({"kind": "quantize_weights"}, "calibration"),
        ({"kind": "quantize_select"}, "calibration"),
    ],
    ids=str,
)
def test_rows_of_a_split(pass_: Mapping[str, Any], split: Split, *, files: bool) -> None:
    after = [FOLD] if not pass_["kind"].startswith("quantize") else []
    config = config_of(pass_, *after)
    words = (
        rf"^variant 'v', pass 1 \({pass_['kind']}\) needs rows of the {split} split, and base 'tiny' has none; give "
    )
    with pytest.raises(PassFailed, match=words):
        require_data(config, lacking(split, files=files))
    other: Split = "calibration" if split == "train" else "train"
    if pass_ not in (DISTILL, {"kind": "distill", "patience": 3}):
        require_data(config, lacking("test", files=files))
    if not {"patience", "importance", "recovery"} & set(pass_):
        require_data(config, lacking(other, files=files))


@pytest.mark.parametrize(
    "pass_",
    [{"kind": "distill", "alpha": 0.5}, {"kind": "prune_channels", "macs": 0.5, "importance": "taylor"}],
    ids=lambda pass_: pass_["kind"],
)
def test_labels(pass_: Mapping[str, Any]) -> None:
    unlabelled = replace(tiny_base(), labels=None)
    with pytest.raises(
        PassFailed, match=r"pass 1 \(\w+\) needs labels, and the train split of base 'tiny' has none; add"
    ):
        require_data(config_of(pass_), unlabelled)
    require_data(config_of(pass_), tiny_base())
    without = {name: value for name, value in pass_.items() if name not in {"alpha", "importance"}}
    require_data(config_of(without), unlabelled)


@pytest.mark.parametrize("rows", ["one", "one_length"])
def test_batches(rows: RowsTogether) -> None:
    base = tiny_base()
    apart = replace(base, spec=replace(base.spec, rows=rows))
    with pytest.raises(PassFailed, match=rf"pass 2 \(distill\) needs batches .* base.rows: {rows} .*; drop the pass"):
        require_data(config_of({"kind": "lowrank_conv", "energy": 0.9}, DISTILL), apart)
    require_data(config_of({"kind": "lowrank_conv", "energy": 0.9}), apart)


def test_a_gpu(tmp_path: Path) -> None:
    on_gpu = config_of(FOLD, {"kind": "onnxruntime", "provider": "cuda"})
    with pytest.raises(
        PassFailed, match=r"pass 2 \(onnxruntime\) needs an NVIDIA GPU, and .* none; choose `provider: cpu`"
    ):
        require_machine(on_gpu, "g++", tmp_path)
    require_machine(config_of({"kind": "onnxruntime"}), "g++", tmp_path)
    (tmp_path / "nvidiactl").touch()
    with pytest.raises(PassFailed, match="needs an NVIDIA GPU"):
        require_machine(on_gpu, "g++", tmp_path)
    (tmp_path / "nvidia0").touch()
    require_machine(on_gpu, "g++", tmp_path)


def test_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = config_of({"kind": "torch_compile"})
    compiler = tmp_path / "mine"
    with pytest.raises(
        PassFailed, match=r"pass 1 \(torch_compile\) needs a C\+\+ compiler .* no '.*mine'; install .* CXX"
    ):
        require_machine(compiled, str(compiler))
    require_machine(config_of(FOLD), str(compiler))
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    header = tmp_path / "Python.h"
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(PassFailed, match=r"needs Python's headers, and there is no .*Python.h; install them"):
        require_machine(compiled, str(compiler))
    header.touch()
    require_machine(compiled, str(compiler))


def test_a_compiler_where_it_is_built(tmp_path: Path) -> None:
    ahead, nowhere = config_of({"kind": "aot_inductor"}), str(tmp_path / "mine")
    require_machine(ahead, nowhere)
    with pytest.raises(PassFailed, match=r"pass 1 \(aot_inductor\) needs a C\+\+ compiler where it is built, and"):
        require_data(ahead, tiny_base(), nowhere)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of two numbers, with data for the gate alone."""
    program = torch.export.export(
        nn.Linear(2, 3).eval(), (torch.zeros(2, 2),), dynamic_shapes=({0: torch.export.Dim("rows")},)
    )
    torch.export.save(program, tmp_path / "m.pt2")
    random = np.random.default_rng(0)
    for name in ("gate", "rest"):
        np.savez(tmp_path / f"{name}.npz", x=random.standard_normal((20, 2)).astype(np.float32))
    return tmp_path


def written(folder: Path, passes: str, data: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(
        f"base: {{torch_export: m.pt2, inputs: {{input: {{shape: [2]}}}}}}\n"
        f"data: {{arrays: {data}, inputs: x}}\n"
        f"variants:\n  - {{name: plain}}\n  - {{name: small, passes: [{passes}]}}\n"
    )
    return path


@pytest.mark.parametrize("command", ["check", "build"])
def test_commands_say_it_in_one_line_before_anything_is_built(command: str, folder: Path) -> None:
    path = written(folder, "{kind: quantize_static}", "{gate: gate.npz}")
    arguments = [command, "--config", str(path)] + (["--cache", str(folder / "cache")] if command == "build" else [])
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, StartupError)
    assert str(result.exception) == (
        "variant 'small', pass 1 (quantize_static) needs rows of the calibration split, and base 'm' has none; "
        "give `data` more rows, or drop the pass"
    )
    assert not list((folder / "cache").glob("artifacts/*"))
    fine = written(folder, "{kind: quantize_static}", "{gate: gate.npz, train: rest.npz}")
    assert CliRunner().invoke(app, ["check", "--config", str(fine)]).exit_code == 0


def test_a_start_from_the_cache_looks_for_the_compiler_and_leaves_the_data_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(folder, "{kind: onnxruntime}", "{gate: gate.npz}")
    monkeypatch.setattr("leanserve.build.plan.shortfall", lambda *_: None)
    looked: list[str] = []
    monkeypatch.setattr("leanserve.build.needs.require_data", lambda *_: looked.append("data"))
    monkeypatch.setattr("leanserve.build.needs.require_machine", lambda _, compiler: looked.append(compiler))
    monkeypatch.setenv("CXX", "mine")
    context.AppContext(path, folder / "cache")
    assert looked == ["mine"]
    monkeypatch.setattr("leanserve.build.plan.shortfall", lambda *_: "something")
    context.AppContext(path, folder / "cache")
    assert looked == ["mine", "mine", "data"]
