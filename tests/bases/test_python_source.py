"""`base: {python: module:factory}`: what it finds out, what it asks for, and what makes it a different model."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from leanserve.bases.opening import open_base, reopen_base
from leanserve.bases.origin import Origin, open_source
from leanserve.bases.sources import python_module
from leanserve.config.base_section import PythonBase
from leanserve.contracts import TensorSpec, TorchModel
from leanserve.errors import ConfigError
from leanserve.passes.toolkit.lowering import export_onnx

SOURCE = """
import torch
from torch import nn
from bring_blocks import Scale

INPUTS = ({"name": "left", "dtype": "float32", "shape": (3,)}, {"name": "ids", "dtype": "int64", "shape": (None,)})

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = Scale()
    def forward(self, left, ids):
        return self.scale(left.sum(1, keepdim=True)), ids + 1

def two():
    return Two()

def linear(classes=4):
    return nn.Linear(3, classes)

def total():
    class Total(nn.Module):
        def forward(self, image):
            return image.sum()
    return Total()

def image():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 2))

def mixing():
    return nn.Sequential(nn.Linear(3, 4), nn.Softmax(dim=0))

def dropout():
    class Dropout(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x)
    return Dropout()

def broken():
    raise RuntimeError("no such luck")

def number():
    return 5

def optional():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)
        def forward(self, x, mask=None, shift=None):
            y = self.layer(x if mask is None else x * mask)
            return y if shift is None else y - shift
    return Optional()

def small(rows):
    class Small(nn.Module):
        def forward(self, x):
            if len(x) > rows:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes.")
            return x
    return Small()
"""
BLOCKS = """
import torch
class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(1))
    def forward(self, x):
        return x * self.factor
"""
ROWS = {"synthetic": 16}
VECTOR = {"inputs": {"x": {"shape": [3]}}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "bring_model.py").write_text(SOURCE)
    (tmp_path / "bring_blocks.py").write_text(BLOCKS)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield tmp_path
    for name in ("bring_model", "bring_blocks"):
        sys.modules.pop(name, None)


def origin(folder: Path, factory: str, **keys: Any) -> Origin:
    declared = {"python": f"bring_model:{factory}", **keys}
    return Origin.model_validate({"base": declared, "data": ROWS, "folder": folder, "cache": folder / "cache"})


def test_outputs_are_traced_and_the_answers_are_those_of_the_module(folder: Path) -> None:
    base = open_base(origin(folder, "two"))
    assert base.name == "bring_model"
    assert base.spec.outputs == (TensorSpec("output", "float32", (1,)), TensorSpec("output_1", "int64", (None,)))
    left, ids = base.spec.example(2, length=5)
    got, plus = base.torch_module()(torch.from_numpy(left), torch.from_numpy(ids))
    np.testing.assert_allclose(got.detach(), left.sum(1, keepdims=True), rtol=1e-6)
    assert (plus.numpy() == ids + 1).all()


def test_another_process_opens_the_same_base(folder: Path) -> None:
    base = open_base(origin(folder, "linear", **VECTOR))
    again = reopen_base(base.origin)
    assert (again.digest, again.spec) == (base.digest, base.spec)
    assert len(again.data("gate")) == ROWS["synthetic"]
    assert again.caveats == ("weights drawn at random (weight, bias)", "synthetic data")


def test_labels_make_it_a_classifier_and_must_be_as_many_as_its_classes(folder: Path) -> None:
    base = open_base(origin(folder, "linear", **VECTOR, labels=["a", "b", "c", "d"]))
    assert base.spec.outputs[0] == TensorSpec("logits", "float32", (4,), meaning="logits")
    assert base.score((np.eye(4, dtype=np.float32),), np.array([0, 1, 2, 0])) == 0.75
    with pytest.raises(ConfigError, match=r"base\.labels: 2 labels, and no output has 2 numbers per row: .* \[4\]"):
        open_base(origin(folder, "linear", **VECTOR, labels=["a", "b"]))
    (folder / "labels.txt").write_text("a\nb\na\nc\n")
    with pytest.raises(ConfigError, match=r"base\.labels: 'a' stands twice"):
        open_base(origin(folder, "linear", **VECTOR, labels="labels.txt"))


def test_rows_that_share_no_batch_come_one_by_one_and_it_is_told(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"cannot be served: the answer to a row depends on the other rows.*base\.rows: one"
    ):
        open_base(origin(folder, "mixing", **VECTOR))
    base = open_base(origin(folder, "mixing", **VECTOR, rows="one"))
    assert [len(batch.inputs[0]) for batch in base.data("gate").batches(8)] == [1] * ROWS["synthetic"]
    assert base.caveats[-2:] == ("every row has a batch to itself", "synthetic data")
    assert (base.spec.rows, base.spec.most_rows(32), open_base(origin(folder, "two")).spec.most_rows(32)) == (
        "one",
        1,
        32,
    )


def test_dropout_that_is_left_on_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="the same row gets another answer the second time"):
        open_base(origin(folder, "dropout", **VECTOR))


def test_an_image_model_takes_images(folder: Path) -> None:
    image = {"size": [5, 4], "mean": [0, 0, 0], "std": [1, 1, 1]}
    base = open_base(origin(folder, "image", image=image, labels=["cat", "dog"]))
    assert base.spec.inputs == (TensorSpec("image", "float32", (3, 4, 5)),)
    decoded = base.codec.decode("application/json", b'{"inputs": [[[255, 0, 0]]]}')
    assert decoded.inputs[0].shape == (1, 3, 4, 5)


def test_the_second_opening_does_not_run_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_base(origin(folder, "linear", **VECTOR))
    monkeypatch.setattr(python_module, "traced", None)
    assert open_base(origin(folder, "linear", **VECTOR)).digest == first.digest


def test_the_digest_follows_code_imports_arguments_and_weights(folder: Path) -> None:
    def digest(**keys: Any) -> str:
        return open_source(PythonBase(python="bring_model:linear", **keys), folder).fingerprint()

    seen = [digest(), digest(arguments={"classes": 2})]
    for scale in (1.0, 2.0):
        save_file({"weight": torch.full((4, 3), scale), "bias": torch.zeros(4)}, folder / "w.safetensors")
        seen.append(digest(weights=Path("w.safetensors")))
    (folder / "bring_blocks.py").write_text(BLOCKS + "# changed\n")
    seen.append(digest())
    (folder / "unrelated.py").write_text("x = 1\n")
    assert digest() == seen[-1]
    assert len(set(seen)) == len(seen)


def test_of_several_weights_in_a_file_the_config_chooses(folder: Path) -> None:
    plain, average = ({"weight": torch.full((4, 3), value), "bias": torch.zeros(4)} for value in (1.0, 2.0))
    torch.save({"state_dict": plain, "state_dict_ema": average}, folder / "w.pth.tar")
    rows = torch.ones(1, 3)
    base = open_base(origin(folder, "linear", **VECTOR, weights="w.pth.tar"))
    assert base.caveats == ("weights are state_dict_ema, not state_dict (base.weights_key)", "synthetic data")
    assert base.torch_module()(rows).tolist() == [[6.0] * 4]
    chosen = open_base(origin(folder, "linear", **VECTOR, weights="w.pth.tar", weights_key="state_dict"))
    assert chosen.caveats == ("synthetic data",)
    assert chosen.torch_module()(rows).tolist() == [[3.0] * 4]
    assert chosen.digest != base.digest
    with pytest.raises(ConfigError, match=r"base.weights_key: .* under 'best'; there are state_dict, state_dict_ema"):
        open_base(origin(folder, "linear", **VECTOR, weights="w.pth.tar", weights_key="best"))
    with pytest.raises(ValidationError, match="weights_key chooses among the weights of a file; name the file"):
        origin(folder, "linear", **VECTOR, weights_key="state_dict")


def test_weights_are_not_rounded_to_what_the_factory_builds(folder: Path) -> None:
    (folder / "bring_model.py").write_text(SOURCE + "\ndef half():\n    return nn.Linear(3, 4).half()\n")
    weight = torch.full((4, 3), 1 / 3)
    save_file({"weight": weight, "bias": torch.zeros(4)}, folder / "w.safetensors")
    base = open_base(origin(folder, "half", **VECTOR, weights="w.safetensors"))
    assert torch.equal(base.torch_module().get_parameter("weight"), weight)


def test_a_module_may_import_torchvision(folder: Path) -> None:
    """In a process of its own, as the first to import it; its wheel may be built for another torch."""
    source = "import torchvision\nfrom torch import nn\ndef linear():\n    return nn.Linear(3, 4)\n"
    (folder / "bring_model.py").write_text(source)
    program = (
        "import sys; from leanserve.bases.opening import reopen_base; base = reopen_base(sys.argv[1]);"
        "print(base.spec.outputs[0].shape, 'torchvision' in sys.modules)"
    )
    command = [sys.executable, "-c", program, origin(folder, "linear", **VECTOR).model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["(4,)", "True"]


@pytest.mark.parametrize(
    ("factory", "keys", "message"),
    [
        (
            "linear",
            {"inputs": {"x": {"shape": [7]}}},
            r"does not run on x \[3, 7\].*base\.image, base\.text, base\.audio or base\.inputs",
        ),
        ("total", VECTOR, "the first axis must count the rows"),
        ("broken", VECTOR, "bring_model:broken failed: RuntimeError: no such luck"),
        ("number", VECTOR, "returned a int, no torch module"),
        ("absent", VECTOR, "has no function absent"),
        ("linear", {**VECTOR, "arguments": {"colour": 1}}, "bring_model:linear failed: TypeError"),
        ("linear", {**VECTOR, "weights": "none.pt"}, "there is no file .*none.pt"),
    ],
)
def test_what_is_wrong_is_said_with_its_key(folder: Path, factory: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_base(origin(folder, factory, **keys))


def test_a_model_that_has_memory_for_a_single_row_is_served_row_by_row_and_for_none_is_refused(folder: Path) -> None:
    single = {**VECTOR, "arguments": {"rows": 1}}
    with pytest.raises(
        ConfigError, match=r"no memory to run the model on x \[3, 3\]: .* does run on a single row\. .*rows: one"
    ):
        open_base(origin(folder, "small", **single))
    base = open_base(origin(folder, "small", **single, rows="one"))
    assert base.spec.outputs[0].shape == (3,)
    with pytest.raises(ConfigError, match=r"there is no memory to run the model on x \[3, 3\]: .* can't allocate"):
        open_base(origin(folder, "small", **VECTOR, arguments={"rows": 0}))


def test_what_is_beside_the_config_takes_nobodys_place(folder: Path) -> None:
    for name in ("queue", "torch", "models"):
        (folder / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    (folder / "bring_model.py").write_text("import queue\nqueue.SimpleQueue()\n" + SOURCE)
    assert open_base(origin(folder, "linear", **VECTOR)).name == "bring_model"
    assert sys.path[-1] == str(folder)


@pytest.mark.parametrize("module", ["queue", "leanserve_models.mine", "leanserve.mine", "numpy"])
def test_a_factory_in_a_module_that_is_called_like_another_one_is_refused(folder: Path, module: str) -> None:
    file = folder.joinpath(*module.split(".")).with_suffix(".py")
    file.parent.mkdir(exist_ok=True)
    file.write_text(SOURCE)
    with pytest.raises(ConfigError, match=rf"{file} cannot be imported as {module}: .* give yours another name"):
        open_source(PythonBase(python=f"{module}:linear"), folder).fingerprint()


@pytest.mark.parametrize("package", ["models", "service"])
def test_a_factory_may_lie_in_a_package_of_any_other_name(folder: Path, package: str) -> None:
    (folder / package).mkdir()
    (folder / package / "__init__.py").touch()
    (folder / package / f"mine_{package}.py").write_text(SOURCE)
    base = open_base(origin(folder, "", **VECTOR | {"python": f"{package}.mine_{package}:linear"}))
    assert base.name == f"mine_{package}"


def test_an_import_from_a_folder_that_is_called_like_ours_is_explained(folder: Path) -> None:
    (folder / "leanserve_models").mkdir()
    (folder / "leanserve_models" / "blocks.py").write_text(BLOCKS)
    (folder / "bring_model.py").write_text("import leanserve_models.blocks\n" + SOURCE)
    named = r"No module named 'leanserve_models\.blocks' \(leanserve_models is a package of leanserve's"
    with pytest.raises(ConfigError, match=named):
        open_base(origin(folder, "linear", **VECTOR))


def test_what_cannot_be_found_out_is_asked_for(folder: Path) -> None:
    (folder / "bring_model.py").write_text(SOURCE.replace("INPUTS", "UNTOLD"))
    with pytest.raises(ConfigError, match=r"declare base\.image .* base\.text .*base\.inputs"):
        open_base(origin(folder, "linear"))
    without_data = Origin.model_validate({"base": {"python": "bring_model:linear", **VECTOR}, "folder": folder})
    with pytest.raises(ConfigError, match="add `data:` with images, arrays or texts"):
        open_base(without_data)
    (folder / "bring_model.py").write_text("def linear(:\n")
    with pytest.raises(ConfigError, match=r"bring_model\.py:1"):
        open_base(origin(folder, "linear", **VECTOR))


def test_optional_inputs_may_be_left_out_and_are_given_by_name(folder: Path, tmp_path: Path) -> None:
    both = {"inputs": {"shift": {"shape": [4]}, "x": {"shape": [3]}}}
    base = open_base(origin(folder, "optional", **both))
    assert [item.name for item in base.spec.inputs] == ["shift", "x"], "in the order of the config"
    module = base.torch_module()
    shift, x = torch.ones(2, 4), torch.randn(2, 3)
    wanted = open_base(origin(folder, "optional", inputs={"x": {"shape": [3]}})).torch_module()(x) - 1
    torch.testing.assert_close(module(shift, x), wanted)
    graph = export_onnx(TorchModel(copy.deepcopy(module), base.spec), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(graph.path)
    given = session.run(None, {"shift": shift.numpy(), "x": x.numpy()})
    np.testing.assert_allclose(np.asarray(given[0]), wanted.detach(), rtol=1e-5, atol=1e-6)
