"""Exported programs as bases: what they take, and what is taken out of the file or refused before torch sees it."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.export import Dim, export, save

from leanserve.bases.loaded import LoadedBase
from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.bases.sources.exported_archive import safe_copy
from leanserve.config.schema import read_config
from leanserve.contracts import TensorSpec, TorchModel
from leanserve.errors import ConfigError
from leanserve.passes.toolkit.lowering import export_onnx, open_session
from leanserve.runtime.formats.torch_size import count_macs, count_parameters

ROWS = {0: Dim.AUTO}
PROGRAM = "models/model.json"


class Net(nn.Module):
    """A layer with parameters, one with statistics, a plain tensor, dropout, and arithmetic on a size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.drop = nn.Dropout()
        self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.norm(self.conv(x)).relu()
        maps = maps[..., : maps.shape[-1] // 2]
        return self.head(self.drop(maps.mean((2, 3)) * self.scale))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def file(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    save(export(net, (torch.randn(2, 1, 8, 8),), dynamic_shapes=({0: Dim.AUTO, 3: Dim.AUTO},)), path)
    return path


def opened(path: Path, **declared: Any) -> LoadedBase:
    base = {"torch_export": path.name, "rows": "one_length", **declared}  # the net takes means over its open axis
    return open_base(Origin.model_validate({"base": base, "data": {"synthetic": 8}, "folder": path.parent}))


def torch_model(base: LoadedBase) -> TorchModel:
    model = base.model()
    assert isinstance(model, TorchModel)
    return model


def test_the_program_tells_what_it_takes_and_answers_as_its_source_did(file: Path, net: nn.Module) -> None:
    base = opened(file)
    assert base.name == "net"
    assert base.spec.inputs == (TensorSpec("x", "float32", (1, 8, None)),)
    assert base.spec.outputs == (TensorSpec("output", "float32", (3,)),)
    module = torch_model(base).module
    for rows, width in ((1, 8), (3, 12), (40, 8)):
        x = torch.randn(rows, 1, 8, width)
        with torch.inference_mode():
            torch.testing.assert_close(module(x), net(x))


def test_the_config_may_narrow_and_name_its_inputs(file: Path) -> None:
    base = opened(file, inputs={"pixels": {"shape": [1, 8, 8]}}, labels=["a", "b", "c"], name="mine")
    assert (base.name, base.spec.inputs) == ("mine", (TensorSpec("pixels", "float32", (1, 8, 8)),))
    assert (base.spec.outputs[0].name, base.spec.labels) == ("logits", ("a", "b", "c"))
    with pytest.raises(ConfigError, match=r"declares rows of float32 \[1, 9, 8\]; .* takes float32 \[1, 8, None\]"):
        opened(file, inputs={"pixels": {"shape": [1, 9, 8]}})


def test_what_the_build_needs_works_on_it(file: Path, net: nn.Module, tmp_path: Path) -> None:
    """Modes, sizes, weights stored and loaded again, and the way to ONNX with layers named as they were."""
    model = torch_model(opened(file))
    assert model.module.eval().train() is model.module
    assert not any(part.training for part in model.module.modules())
    expected = TorchModel(net, model.spec)
    assert count_macs(model) == count_macs(expected)
    assert count_parameters(model) == count_parameters(expected)
    fresh = torch_model(opened(file)).module
    fresh.load_state_dict(model.module.state_dict(), strict=True)
    path = export_onnx(model, tmp_path / "net.onnx").path
    names = [node.name for node in onnx.load(path).graph.node]
    assert {"conv/Conv", "head/Gemm"} <= set(names), names
    session = open_session(path)
    x = torch.randn(5, 1, 8, 8)
    with torch.inference_mode():
        np.testing.assert_allclose(
            np.asarray(session.run(None, {"x": x.numpy()})[0]), net(x).numpy(), rtol=1e-4, atol=1e-5
        )


class Keyword(nn.Module):
    def forward(self, x: torch.Tensor, *, shift: torch.Tensor) -> torch.Tensor:
        return x + shift


def exported(path: Path, module: nn.Module, *inputs: torch.Tensor, shapes: Any, **keywords: torch.Tensor) -> Path:
    save(export(module, inputs, keywords, dynamic_shapes=shapes), path)
    return path


def test_a_program_for_a_single_row_is_served_row_by_row(tmp_path: Path) -> None:
    layer, row = nn.Linear(4, 3).eval(), torch.randn(1, 4)
    path = exported(tmp_path / "one.pt2", layer, row, shapes=None)
    base = opened(path, rows="one")
    assert base.spec.outputs == (TensorSpec("output", "float32", (3,)),)
    onnx_file = export_onnx(torch_model(base), tmp_path / "one.onnx")
    (given,) = open_session(onnx_file.path).run(None, {base.spec.inputs[0].name: row.numpy()})
    np.testing.assert_allclose(np.asarray(given), layer(row).detach().numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigError, match=r"A program for a single row is served by base\.rows: one"):
        opened(path)


def test_programs_that_cannot_be_served(tmp_path: Path) -> None:
    rows, layer = torch.randn(2, 4), nn.Linear(4, 3).eval()
    made: dict[str, Callable[[Path], Path]] = {
        r"its first axis must be dynamic.*dynamic_shapes": lambda path: exported(path, layer, rows, shapes=None),
        r"takes 0 to 8 rows; batches have 1 to 32": lambda path: exported(
            path, layer, rows, shapes=({0: Dim("r", max=8)},)
        ),
        r"has 'weight' in float16; export it in float32": lambda path: exported(
            path, nn.Linear(4, 3).half(), rows.half(), shapes=(ROWS,)
        ),
        r"depends on the other rows of its batch.*training mode": lambda path: exported(
            path, nn.BatchNorm1d(4), rows, shapes=(ROWS,)
        ),
        r"tensors only, by position.*it takes x, shift": lambda path: exported(
            path, Keyword(), rows, shapes={"x": ROWS, "shift": ROWS}, shift=rows
        ),
    }
    for reason, make in made.items():
        with pytest.raises(ConfigError, match=reason):
            opened(make(tmp_path / "m.pt2"))


def test_torch_passes_are_refused_when_the_config_is_read(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("base: {torch_export: m.pt2}\nvariants: [{name: a, passes: [{kind: distill}]}]\n")
    with pytest.raises(ConfigError, match=r"'distill'.*of the form 'torch_export' apply only: .*onnxruntime"):
        read_config(tmp_path / "c.yaml")


def rewritten(file: Path, target: Path, change: Callable[[str, bytes], bytes | None], **more: bytes) -> Path:
    """The archive with every member replaced by what `change` makes of it; `more` are further members."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.namelist():
            content = change(member.removeprefix("net/"), old.read(member))
            if content is not None:
                new.writestr(member, content)
        for name, content in more.items():
            new.writestr(name, content)
    return target


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_pickles_that_are_not_needed_are_left_out(file: Path, tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    armed = rewritten(
        file, tmp_path / "net.pt2", lambda name, content: bomb if name.startswith("data/sample_inputs") else content
    )
    assert opened(armed).spec == opened(file).spec
    assert not (tmp_path / "exploded").exists()


def edited(key: str, value: Any) -> Callable[[str, bytes], bytes]:
    """Replaces every value under `key` in the program and the tables of tensors."""

    def replace(found: Any) -> Any:
        if isinstance(found, list):
            return [replace(item) for item in found]
        if isinstance(found, dict):
            return {name: value if name == key else replace(item) for name, item in found.items()}
        return found

    return lambda name, content: json.dumps(replace(json.loads(content))).encode() if name.endswith("json") else content


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("use_pickle", True, "'conv.weight' as a pickle"),
        ("path_name", "opaque_obj_0", "'conv.weight' as a pickle"),
        ("target", "torch.hub.load", "the operator 'torch.hub.load'"),
        ("target", "torch.ops.aten.from_file.default", "the operator 'torch.ops.aten.from_file.default'"),
        ("target", "_operator.attrgetter", "the operator '_operator.attrgetter'"),
        ("expr_str", "__import__('os').system('true')", "the shape"),
        ("expr_str", "Symbol('s0').func", "the shape"),
        ("expr_str", "Integer('open(1)')", "the shape"),
        ("expr_str", "exit(Integer(1))", "the shape"),
        ("expr_str", "Add(s0)(s1)", "the shape"),
        ("guards_code", ["__import__('os').system('true')"], "the guard"),
        ("guards_code", ["L['x'].size()[0].real == 1"], "the guard"),
        ("in_spec", '[1, {"type": null, "context": "{\\"__enum__\\": true}", "children_spec": []}]', "under 'in_spec'"),
        ("fqn", "a\nimport os", "under 'fqn'"),
    ],
)
def test_what_torch_would_run_is_refused(file: Path, tmp_path: Path, key: str, value: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"{reason}.*which is not read: torch could run any code with it"):
        safe_copy(rewritten(file, tmp_path / "net.pt2", edited(key, value)))


def test_compiled_code_is_refused(file: Path, tmp_path: Path) -> None:
    armed = rewritten(
        file, tmp_path / "net.pt2", lambda _, content: content, **{"net/data/aotinductor/model/a.so": b""}
    )
    with pytest.raises(ConfigError, match=r"holds compiled code \(data/aotinductor/model/a\.so\)"):
        safe_copy(armed)


def test_other_files_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*none\.pt2"):
        safe_copy(tmp_path / "none.pt2")
    other = tmp_path / "net.pt2"
    other.write_bytes(b"PK not really")
    with pytest.raises(ConfigError, match=r"is not a program as torch\.export\.save writes it now"):
        safe_copy(other)
    with pytest.raises(ConfigError, match=r"no single models/model\.json in it"):
        safe_copy(rewritten(file, other, lambda name, content: None if name == PROGRAM else content))
    with pytest.warns(UserWarning, match="Duplicate name"):
        rewritten(file, other, lambda _, content: content, **{f"net/{PROGRAM}": b"{}"})
    with pytest.raises(ConfigError, match=r"no single models/model\.json in it"):
        safe_copy(other)


def test_a_program_of_another_version_is_refused_with_advice(file: Path, tmp_path: Path) -> None:
    newer = rewritten(file, tmp_path / "net.pt2", edited("schema_version", {"major": 999, "minor": 1}))
    with pytest.raises(ConfigError, match=r"cannot read .*net\.pt2 \(.*; export it with this version"):
        opened(newer)
