"""What makes a python base another model: everything that decides its answers, wherever the factory has it from."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import invalidate_caches
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin, open_source
from leanserve.config.base_section import PythonBase
from leanserve.errors import ConfigError

MODEL = """
import json, os, random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
import numpy as np
import torch
from torch import nn

VALUE = json.loads((Path(__file__).parent / "value.json").read_text())
TABLE = torch.tensor([float(VALUE)] * 3)

@dataclass
class Settings:
    temperature: float

class Plain:
    __slots__ = "value"
    def __init__(self, value):
        self.value = value

class Net(nn.Module):
    def __init__(self, fill=1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), fill))
    def forward(self, x):
        return x * self.scale

def net():
    return Net()

def other():
    return Net(2.0)

def same_as_net():
    return Net()

def parameter():
    return Net(float(VALUE))

def unsaved_buffer():
    net = Net()
    net.register_buffer("table", torch.tensor(float(VALUE)), persistent=False)
    return net

def attribute(value):
    net = Net()
    net.held = value
    return net

def tensor():
    return attribute(torch.tensor(float(VALUE)))

def tensors():
    return attribute([torch.zeros(1), {"deep": (torch.tensor(float(VALUE)),)}])

def array():
    return attribute(np.array([float(VALUE)]))

def number():
    return attribute(float(VALUE))

def text():
    return attribute(f"mode {VALUE}")

def settings():
    return attribute(Settings(float(VALUE)))

def own_object():
    return attribute(Plain({"list": [float(VALUE)]}))

def closure():
    value = float(VALUE)
    return attribute(lambda x: x * value)

def hook():
    net, value = Net(), float(VALUE)
    net.register_forward_hook(lambda module, inputs, output: output * value)
    return net

class ReadsGlobal(Net):
    def forward(self, x):
        return helped(super().forward(x))

@cache
def table():
    return TABLE

def helped(x):
    return x * table()

def globals_of_code():
    return ReadsGlobal()

class ClassValue(Net):
    factor = float(VALUE)
    @torch.no_grad()
    def forward(self, x):
        return self.inner(x)
    def inner(self, x):
        return x * self.factor
    def training_step(self):
        return DRAWN
DRAWN = os.urandom(8)

def class_value():
    return ClassValue()

def wide():
    return attribute(torch.ones(2) if VALUE == 1 else torch.ones(2, 1))

def kind():
    return attribute(torch.ones(1, dtype=torch.int32) if VALUE == 1 else torch.ones(1))

def activation():
    return nn.Sequential(Net(), nn.ReLU() if VALUE == 1 else nn.Tanh())

def tied():
    one = nn.Linear(3, 3)
    two = nn.Linear(3, 3)
    two.weight = one.weight if VALUE == 1 else nn.Parameter(one.weight.detach().clone())
    return nn.Sequential(one, two)

class Constant(nn.Module):
    def forward(self, x):
        return x * torch.tensor(float(VALUE))

def traced():
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(Constant(), torch.ones(1, 3))

def argument(path, more=()):
    return Net()

def drawn():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[0].weight.data.fill_(float(np.random.rand()) + random.random())
    net[1].load_state_dict({"weight": torch.ones(3, 3), "bias": torch.ones(3)})
    return net

def unseeded():
    return Net(float(np.random.default_rng().random()))

def of_this_process():
    return Net(float(os.getpid()))

def reads():
    return Net(json.loads((Path(__file__).parent / "late.json").read_text()))
"""
ROWS = {"synthetic": 16}
VECTOR = {"inputs": {"x": {"shape": [3]}}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "held_model.py").write_text(MODEL)
    (tmp_path / "value.json").write_text("1")
    (tmp_path / "late.json").write_text("1.0")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield tmp_path
    forget()


def forget() -> None:
    """As if in another process."""
    for name in [name for name in sys.modules if name.startswith(("held_", "closed_"))]:
        del sys.modules[name]
    invalidate_caches()


def fingerprint(folder: Path, factory: str, **keys: Any) -> str:
    forget()
    place = factory if ":" in factory else f"held_model:{factory}"
    return open_source(PythonBase(python=place, **keys), folder).fingerprint()


def origin(folder: Path, factory: str, **keys: Any) -> Origin:
    declared = {"python": f"held_model:{factory}", **VECTOR, **keys}
    return Origin.model_validate({"base": declared, "data": ROWS, "folder": folder, "cache": folder / "cache"})


def test_the_factory_decides_and_what_it_makes(folder: Path) -> None:
    found = [fingerprint(folder, factory) for factory in ("net", "other", "same_as_net")]
    assert len(set(found)) == 3
    assert fingerprint(folder, "net") == found[0]


@pytest.mark.parametrize(
    "factory",
    [
        *("parameter", "unsaved_buffer", "tensor", "tensors", "array", "number", "text", "settings", "own_object"),
        *("closure", "hook", "globals_of_code", "class_value", "wide", "kind", "activation", "tied", "traced"),
    ],
)
def test_what_the_factory_reads_decides_wherever_the_module_keeps_it(folder: Path, factory: str) -> None:
    before = fingerprint(folder, factory)
    assert fingerprint(folder, factory) == before
    (folder / "value.json").write_text("2")
    assert fingerprint(folder, factory) != before
    (folder / "value.json").write_text("1")
    assert fingerprint(folder, factory) == before


def test_what_the_model_does_not_use_decides_nothing(folder: Path) -> None:
    before = fingerprint(folder, "net")
    (folder / "value.json").write_text("2")
    assert fingerprint(folder, "net") == before


def test_where_the_folder_lies_decides_nothing(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other") / "place"
    shutil.copytree(folder, other)
    before = fingerprint(folder, "text")
    sys.path.remove(str(folder))
    assert fingerprint(other, "text") == before


def test_files_that_arguments_name_decide_by_their_content(folder: Path) -> None:
    (folder / "names.txt").write_text("one")
    for arguments in ({"path": "names.txt"}, {"path": "", "more": [{"deep": "names.txt"}]}):
        before = fingerprint(folder, "argument", arguments=arguments)
        (folder / "names.txt").write_text("two")
        assert fingerprint(folder, "argument", arguments=arguments) != before
        (folder / "names.txt").write_text("one")
        assert fingerprint(folder, "argument", arguments=arguments) == before
    usual = fingerprint(folder, "argument", arguments={"path": "."})
    (folder / "report.html").write_text("changes by itself")
    assert fingerprint(folder, "argument", arguments={"path": "."}) == usual


FILES = {
    "closed_root.py": "from closed_pack.made import factory\n",
    "closed_pack/__init__.py": "from .shared import *\n",
    "closed_pack/made.py": """
from . import beside
from .near import piece
from .. import closed_far
from .deep.down import down
import closed_pack.named as named
def factory():
    from closed_pack import late
    from importlib import import_module
    import_module("closed_called")
    from torch import nn
    return nn.Linear(3, 3)
""".replace("from .. import closed_far\n", "import closed_far\n"),
    "closed_pack/beside.py": "",
    "closed_pack/near.py": "from .deep import *\npiece = 1\n",
    "closed_pack/shared.py": "",
    "closed_pack/late.py": "",
    "closed_pack/named.py": "",
    "closed_pack/deep/__init__.py": "__all__ = ['starred']\n",
    "closed_pack/deep/starred.py": "",
    "closed_pack/deep/down.py": "from ..further import further\ndown = 1\n",
    "closed_pack/further.py": "further = 1\n",
    "closed_far.py": "",
    "closed_called.py": "",
}


@pytest.fixture
def package(folder: Path) -> Path:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)
    (folder / "closed_pack" / "unrelated.py").write_text("")
    (folder / ".venv" / "lib" / "site-packages" / "closed_library").mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_every_file_that_is_imported_decides(package: Path, name: str) -> None:
    before = fingerprint(package, "closed_root:factory")
    with (package / name).open("a") as file:
        file.write("# changed\n")
    assert fingerprint(package, "closed_root:factory") != before


def test_files_that_are_not_imported_decide_nothing(package: Path) -> None:
    before = fingerprint(package, "closed_root:factory")
    (package / "closed_pack" / "unrelated.py").write_text("x = 1\n")
    (package / "unrelated.py").write_text("x = 1\n")
    assert fingerprint(package, "closed_root:factory") == before


def test_libraries_decide_by_their_versions(package: Path) -> None:
    site = package / "site-packages"
    (site / "closed_library").mkdir(parents=True)
    (site / "closed_library" / "__init__.py").write_text("")
    (site / "closed_library-1.0.dist-info").mkdir()
    (package / "closed_far.py").write_text("import closed_library\n")
    sys.path.insert(0, str(site))
    found: list[str] = []
    for version in ("1.0", "2.0", "2.0"):
        metadata = f"Metadata-Version: 2.1\nName: closed-library\nVersion: {version}\n"
        (site / "closed_library-1.0.dist-info" / "METADATA").write_text(metadata)
        (site / "closed_library" / "__init__.py").write_text(f"# file {len(found)}\n")
        found.append(_version_seen(package))
    assert found[0] != found[1] == found[2]


def _version_seen(package: Path) -> str:
    from leanserve.hardware import library_version

    library_version.cache_clear()
    return fingerprint(package, "closed_root:factory")


def test_a_module_of_an_installed_package_is_followed_within_it(package: Path) -> None:
    site = package / "site-packages"
    shutil.copytree(package / "closed_pack", site / "closed_pack")
    shutil.rmtree(package / "closed_pack")
    sys.path.insert(0, str(site))
    before = fingerprint(package, "closed_pack.made:factory")
    (site / "closed_pack" / "further.py").write_text("further = 2\n")
    assert fingerprint(package, "closed_pack.made:factory") != before


# Random weights


def test_weights_drawn_at_random_are_the_same_in_every_process_and_told(folder: Path) -> None:
    states = random.getstate(), repr(np.random.get_state()), torch.get_rng_state()
    base = open_base(origin(folder, "drawn"))
    assert base.caveats == ("weights drawn at random (0.weight, 0.bias)", "synthetic data")
    assert states[0] == random.getstate()
    assert states[1] == repr(np.random.get_state())
    assert torch.equal(states[2], torch.get_rng_state())
    digest = in_another_process(origin(folder, "drawn").model_dump_json())
    assert digest.stdout.strip() == base.digest
    assert open_base(origin(folder, "net")).caveats == ("synthetic data",)


def test_a_model_that_differs_from_call_to_call_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"makes another model every time.*: scale differ; seed every generator"):
        open_base(origin(folder, "unseeded"))


def test_a_model_that_differs_from_process_to_process_is_refused(folder: Path) -> None:
    base = open_base(origin(folder, "of_this_process"))
    done = in_another_process(base.origin)
    assert done.returncode == 1
    assert "makes another model in every process" in done.stderr.splitlines()[-1]


def in_another_process(text: str) -> subprocess.CompletedProcess[str]:
    """Open a base there, make its model, print its digest."""
    program = (
        "import sys; from leanserve.bases.opening import reopen_base;"
        "base = reopen_base(sys.argv[1]); base.model(); print(base.digest)"
    )
    return subprocess.run([sys.executable, "-c", program, text], capture_output=True, text=True, check=False)


def test_what_is_read_anew_must_not_have_changed(folder: Path) -> None:
    base = open_base(origin(folder, "reads"))
    base.model()
    (folder / "late.json").write_text("2.0")
    with pytest.raises(ConfigError, match="its files have changed meanwhile: scale differ"):
        base.model()


def test_class_names_in_a_file_are_read_when_they_change(folder: Path) -> None:
    labels = folder / "labels.txt"
    labels.write_text("a\nb\nc\n")
    assert open_base(origin(folder, "net", labels="labels.txt")).spec.labels == ("a", "b", "c")
    labels.write_text("a\nb\nd\n")
    assert open_base(origin(folder, "net", labels="labels.txt")).spec.labels == ("a", "b", "d")


def test_data_that_changes_while_others_measure_is_noticed(folder: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    np.savez(folder / "rows.npz", x=rows)
    opened = open_base(origin(folder, "net").model_copy(update={"data": _arrays()}))
    np.savez(folder / "rows.npz", x=rows + 1)
    with pytest.raises(ConfigError, match="files have changed since the build began"):
        open_base(Origin.model_validate_json(opened.origin))


def _arrays() -> Any:
    from leanserve.config.data_section import ArrayFileData

    return ArrayFileData(arrays=Path("rows.npz"))


def test_hooks_are_told_apart_by_what_they_do_not_by_their_number(folder: Path) -> None:
    first = fingerprint(folder, "hook")
    nn.Linear(1, 1).register_forward_hook(print)
    assert fingerprint(folder, "hook") == first


def test_arguments_are_part_of_it(folder: Path) -> None:
    assert fingerprint(folder, "argument", arguments={"path": "a"}) != fingerprint(
        folder, "argument", arguments={"path": "b"}
    )
    assert json.loads(origin(folder, "net").model_dump_json())["fingerprint"] is None
