"""Child processes: they run our packages whatever the working directory holds, and do not outlive their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import leanserve
from leanserve.child import ROOTS, command, how_it_ended

PATH = os.pathsep.join(map(str, ROOTS))
HOSTILE = (
    "service/__init__.py",
    "models/__init__.py",
    "leanserve/__init__.py",
    "leanserve_models/__init__.py",
    "queue.py",
    "json.py",
    "torch.py",
    "service.py",
)
SLEEPER = """\
import subprocess, sys, time
from leanserve.child import command
child = subprocess.Popen(command("timeit", "-n1", "-r1", "import time; time.sleep(60)"))
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory in which everything is called like something that is needed."""
    for name in HOSTILE:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise SystemExit('the wrong {name}')\n")
    return tmp_path


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_child_runs_ours_and_pythons_own_modules(folder: Path) -> None:
    assert run(folder, "leanserve", "version").strip() == leanserve.__version__
    schema = run(folder, "leanserve", "schema")
    assert '"title": "ServiceConfig"' in schema


REPORTS = """\
import multiprocessing, pathlib, sys
import numpy as np, onnx, onnxruntime
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
x, y = (make_tensor_value_info(name, 1, [1]) for name in "xy")
graph = make_graph([make_node("Neg", ["x"], ["y"])], "g", [x], [y])
model = make_model(graph, opset_imports=[make_opsetid("", 20)], ir_version=9)
onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": np.ones(1, np.float32)})
try:
    import openvino.tools.ovc
except ImportError:
    pass
home = pathlib.Path.home()
print([str(path.relative_to(home)) for path in home.rglob("*")], "openvino_telemetry.main" in sys.modules)
"""


@pytest.mark.parametrize("as_child", [True, False])
def test_libraries_report_to_nobody(tmp_path: Path, *, as_child: bool) -> None:
    """What onnxruntime and OpenVINO would send is kept in the home folder first; in CI neither does."""
    (tmp_path / "reports.py").write_text(REPORTS)
    run_it = "import runpy; runpy.run_path('reports.py', run_name='__main__')"
    own = f"import typer, leanserve.__main__ as m\nm.app = lambda: exec({run_it!r})\nm.main()"
    home = tmp_path / "home"
    home.mkdir()
    silent = {"CI", "GITHUB_ACTIONS", "TF_BUILD", "ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED"}
    environment = {key: value for key, value in os.environ.items() if key not in silent}
    arguments = command("timeit", "-n1", "-r1", run_it) if as_child else [sys.executable, "-c", own]
    environment |= {"HOME": str(home), "PYTHONPATH": PATH}
    told = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert told.splitlines()[0] == "[] False"


def test_the_working_directory_is_not_on_the_path_of_a_child(folder: Path) -> None:
    printed = run(folder, "site")  # which prints the path
    assert str(folder) not in printed.partition("]")[0]


def test_a_child_is_of_the_same_installation_where_another_one_comes_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = folder / "other"
    (other / "leanserve").mkdir(parents=True)
    (other / "leanserve" / "__init__.py").write_text("raise SystemExit('another installation')\n")
    monkeypatch.setenv("PYTHONPATH", f"{other}{os.pathsep}{PATH}")
    assert run(folder, "leanserve", "version").strip() == leanserve.__version__


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends the children")
def test_a_child_does_not_outlive_its_parent_however_that_ends(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": PATH}
    parent = subprocess.Popen(
        [sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=environment
    )
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_running(child)
        parent.kill()
    give_up = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < give_up
        time.sleep(0.01)


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # who has no parent left may stay in the table as a zombie


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (-signal.SIGKILL, "was killed (SIGKILL), as the kernel does when memory runs out"),
        (-signal.SIGSEGV, "was ended by SIGSEGV"),
        (3, "ended with status 3"),
    ],
)
def test_the_end_of_a_child_in_words(status: int, text: str) -> None:
    assert how_it_ended(status) == text
