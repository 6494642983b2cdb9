"""Every command as a clumsy or hostile user has it: whatever is given, a clear line per problem, a status, no stack."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors import SafetensorError

from leanserve import __main__ as command_line
from leanserve import child
from leanserve.bases.sources import onnx_trial
from leanserve.errors import PassFailed
from leanserve.evaluation.fresh_process import in_fresh_process
from leanserve.runtime.formats.tied_tensors import write_tensors

VARIANTS = "variants: [{name: a}]\n"
SMALL = "base: {python: 'hostile_small:Small', inputs: {x: {shape: [4]}}}\n"
MODULE = """\
import torch
class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((1,), 2.0))
    def forward(self, x):
        return x * self.scale
def leave():
    raise SystemExit(0)
def endless():
    return endless()
"""
Run = Callable[..., tuple[int, str]]


class _Ended(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Run]:
    """Runs a command in this process: its status, and what it said on stderr."""

    def end(status: int) -> None:
        raise _Ended(status)

    def ran(*arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["leanserve", *arguments])
        try:
            command_line.main()
            status = 0
        except _Ended as ended:
            status = ended.args[0]
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        for number, handler in handlers.items():  # at once: a process that starts now would inherit what is ignored
            signal.signal(number, handler)
        return status, capfd.readouterr().err

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    level = logging.getLogger("leanserve").level
    (tmp_path / "hostile_small.py").write_text(MODULE)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "junk").write_bytes(bytes(range(256)) * 16)
    path = list(sys.path)
    with warnings.catch_warnings():
        yield ran
    logging.getLogger("leanserve").setLevel(level)
    sys.path[:] = path
    sys.modules.pop("hostile_small", None)


def aliases(levels: int) -> str:
    """Ten to the power of `levels` entries, in as many lines."""
    rows = [f"    a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, levels)]
    return "base:\n  python: hostile_small:Small\n  arguments:\n    a0: &a0 [x]\n" + "".join(rows) + VARIANTS


CONFIGS: list[tuple[str, str | bytes, str]] = [
    ("empty", "", "hostile.yaml:1: the config must be a mapping"),
    ("zeros", bytes(9), r"hostile.yaml:1: not valid YAML: the character .*0.* is not allowed"),
    ("binary", bytes(range(128, 255)), "hostile.yaml:1: not UTF-8"),
    ("latin", b"base: digits\n# \xe9\n", "hostile.yaml:2: not UTF-8 .* save the file in that encoding"),
    ("deep list", "[" * 50_000, "hostile.yaml:1: it is nested too deeply"),
    ("deep map", "base: " + "{a: " * 2000 + "1" + "}" * 2000, "hostile.yaml:1: it is nested too deeply"),
    ("bomb", aliases(9), "hostile.yaml:1: its aliases stand for more than 1000000 entries"),
    ("circle", "base: {python: 'm:f', arguments: &a {x: *a}}\n" + VARIANTS, "hostile.yaml:1: an alias stands within"),
    ("tab", "base: digits\n\tvariants: 1\n", "hostile.yaml:2: not valid YAML: found character '.t'"),
    ("twice", "base: digits\nbase: digits\n", "hostile.yaml:2: key 'base' was given already on line 1"),
    ("two files", "base: digits\n" + VARIANTS + "---\na: 1\n", "hostile.yaml:3: not valid YAML: but found another"),
    ("code", "base: !!python/object/apply:os.system [true]\n", "hostile.yaml:1: not valid YAML: could not determine"),
    ("list as key", "? [a]\n: 1\n", "hostile.yaml:1: a key is a list or a mapping"),
    ("number as key", "1: 2\nbase: digits\n" + VARIANTS, "hostile.yaml:1: 1: "),
    ("no date", "base: digits\nseed: 2020-13-99\n", "hostile.yaml:2: not valid YAML: month must be in 1..12"),
    ("huge number", f"base: digits\nseed: {'9' * 5000}\n", "hostile.yaml:2: not valid YAML: Exceeds the limit"),
    ("nul", 'base: {onnx: "a\\0b.onnx"}\n', "hostile.yaml:1: a text has a NUL"),
    ("surrogate", 'base: digits\ncache: "\\ud800"\n', "hostile.yaml:2: a text has a NUL or half a character"),
    ("not a number", "base: digits\ndrain: {delay_s: .nan}\n" + VARIANTS, "hostile.yaml:2: drain.delay_s: .*finite"),
    ("infinite", "base: digits\ndrain: {timeout_s: .inf}\n" + VARIANTS, "hostile.yaml:2: drain.timeout_s: .*finite"),
    ("threads", "base: digits\nthreads: 100000000\n" + VARIANTS, "hostile.yaml:2: threads: "),
    ("queue", f"base: digits\nbatch: {{queue_rows: {10**20}}}\n" + VARIANTS, "hostile.yaml:2: batch.queue_rows"),
    ("long name", f"base: {{onnx: {'x' * 5000}.onnx}}\n" + VARIANTS, "x .*File name too long; shorten it"),
    ("device", "base: {onnx: /dev/zero}\n" + VARIANTS, "base.onnx: there is no file /dev/zero"),
    ("no graph", "base: {onnx: junk}\n" + VARIANTS, "junk is not an ONNX file"),
    ("endless program", "base: {torch_export: /dev/zero}\n" + VARIANTS, "cannot read /dev/zero: not a regular file"),
    ("endless weights", "base: {timm: resnet18, weights: /dev/zero}\n" + VARIANTS, "/dev/zero: not a regular file"),
    ("fifo as weights", "base: {timm: resnet18, weights: fifo}\n" + VARIANTS, "fifo: not a regular file"),
    ("endless rows", SMALL + "data: {arrays: /dev/zero}\n" + VARIANTS, "data.arrays: /dev/zero is not a .npz file"),
    ("fifo as rows", SMALL + "data: {arrays: fifo}\n" + VARIANTS, "fifo is not a .npz file .*not a regular file"),
    ("junk as rows", SMALL + "data: {arrays: junk}\n" + VARIANTS, "junk is not a .npz file"),
    ("too many rows", SMALL.replace("[4]", "[1000000]") + "data: {synthetic: 100000}\n" + VARIANTS, "at most 1073 are"),
    ("huge row", SMALL.replace("[4]", "[4000000000, 4000000000]") + VARIANTS, "shape: a row has at most"),
    ("a shell", "base: {python: 'os:system'}\n" + VARIANTS, "base.python: os is a module of Python's own"),
    ("an exit", "base: {python: 'sys:exit'}\n" + VARIANTS, "base.python: sys is a module of Python's own"),
    ("leaves", SMALL.replace("Small'", "leave'") + VARIANTS, "hostile_small:leave failed: SystemExit: 0"),
    ("recursion", SMALL.replace("Small'", "endless'") + VARIANTS, "hostile_small:endless failed: RecursionError"),
    ("no module", SMALL.replace("hostile_small", "nowhere") + VARIANTS, "base.python: there is no module nowhere"),
]


@pytest.mark.parametrize(("content", "text"), [row[1:] for row in CONFIGS], ids=[row[0] for row in CONFIGS])
def test_a_config(run: Run, tmp_path: Path, content: str | bytes, text: str) -> None:
    (tmp_path / "hostile.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    status, said = run("check", "--config", "hostile.yaml")
    _is_one_line(status, said, text)


def _is_one_line(status: int, said: str, text: str) -> None:
    """One per problem, which is told first or last."""
    import re

    assert status == 2, said
    assert "Traceback" not in said
    assert re.search(text, said), said
    assert len(said.splitlines()) <= 2, said


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("nothing.yaml", "nothing.yaml: cannot read the config: No such file or directory; name one with --config"),
        (".", "cannot read the config: not a regular file"),
        ("fifo", "fifo: cannot read the config: not a regular file"),
        ("/dev/zero", "/dev/zero: cannot read the config: not a regular file"),
        ("circle", "circle: cannot read the config: Too many levels of symbolic links"),
        ("x" * 300, "cannot read the config: File name too long"),
        ("large", "large: a config of more than 16 MiB is not read"),
    ],
)
def test_a_path_of_a_config(run: Run, tmp_path: Path, path: str, text: str) -> None:
    (tmp_path / "circle").symlink_to("circle")
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(2**40)
    for command in ("check", "serve"):
        _is_one_line(*run(command, "--config", path), text)


@pytest.mark.parametrize(
    ("cache", "text"),
    [
        ("/etc/passwd", "cache folder /etc/passwd: cannot be created .Not a directory.; set 'cache'"),
        ("/dev/null", "cache folder /dev/null: cannot be created"),
        ("fifo", "fifo: cannot be created"),
        ("/proc/none", "cache folder /proc/none: cannot be created"),
        ("x" * 300, "File name too long; shorten it"),
    ],
)
def test_a_cache(run: Run, tmp_path: Path, cache: str, text: str) -> None:
    (tmp_path / "leanserve.yaml").write_text(SMALL + "data: {synthetic: 16}\n" + VARIANTS)
    for command in ("build", "bench"):
        _is_one_line(*run(command, "--config", "leanserve.yaml", "--cache", cache), text)


INITS: list[tuple[tuple[str, ...], str]] = [
    (("",), "'' names no model"),
    (("timm:",), "'timm:' names no model"),
    (("/dev/zero",), "'/dev/zero' names no model"),
    (("fifo",), "'fifo' names no model"),
    (("x" * 300 + ".onnx",), "File name too long; shorten it"),
    (("sys:exit",), "base.python: sys is a module of Python's own"),
    (("hostile_small:leave", "--input", "x=4"), "hostile_small:leave failed: SystemExit"),
    (("hostile_small:Small", "--input", "x=99999999999999999999"), "a row has at most"),
    (("hostile_small:Small", "--input", "x=4", "--data", "fifo"), "--data: there is nothing at fifo"),
    (("hostile_small:Small", "--input", "x=4", "--data", "junk.npz"), "--data junk.npz: not read as its name says"),
    (("hostile_small:Small", "--input", "x=4", "--data", "junk.csv"), "--data junk.csv: not read as its name says"),
    (("hostile_small:Small", "--input", "x=4", "--data", "empty.csv"), "--data: the file is empty"),
    (("digits", "--output", "/dev/full"), "/dev/full exists and is not replaced"),
    (("digits", "--output", "fifo"), "fifo exists and is not replaced"),
    (("digits", "--output", "."), "exists and is not replaced"),
]


@pytest.mark.parametrize(("arguments", "text"), INITS, ids=[str(number) for number in range(len(INITS))])
def test_init(run: Run, tmp_path: Path, arguments: tuple[str, ...], text: str) -> None:
    for name in ("junk.npz", "junk.csv"):
        (tmp_path / name).write_bytes((tmp_path / "junk").read_bytes())
    (tmp_path / "empty.csv").touch()
    _is_one_line(*run("init", *arguments), text)


def test_serve_where_it_cannot_listen(run: Run, tmp_path: Path) -> None:
    (tmp_path / "leanserve.yaml").write_text(SMALL + VARIANTS)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, text in (
            (("--port", port), f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --host"),
            (("--host", "999.1.1.1"), "cannot listen on 999.1.1.1:8000: Name or service not known; choose"),
            (("--host", "192.0.2.1"), "cannot listen on 192.0.2.1:8000: Cannot assign requested address; choose"),
        ):
            _is_one_line(*run("serve", "--config", "leanserve.yaml", *arguments), text)


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (OSError(28, "No space left on device", "/cache/x"), 2, "error: /cache/x: No space left on device; make room"),
        (OSError(30, "Read-only file system", "/cache/x"), 2, "Read-only file system; choose a place"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device; make room"),
        (PermissionError(13, "Permission denied", "a", None, "b"), 2, "a: b: Permission denied; give this user"),
        (MemoryError("Unable to allocate 2 TiB"), 2, "memory ran out .Unable to allocate 2 TiB.; give it more"),
        (PassFailed("variant 'a', pass 1"), 2, "error: variant 'a', pass 1"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_may_happen_anywhere(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, text: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(command_line, "AppContext", fail)
    ended, said = run("report", "--config", "x.yaml")
    assert ended == status
    assert text.split(".", maxsplit=1)[0] in said
    assert len(said.splitlines()) == 1


def test_a_full_disk_is_told_as_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full_disk(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="No space left on device") as full:
        write_tensors({"x": torch.zeros(4)}, tmp_path / "weights")
    assert (full.value.errno, full.value.filename) == (28, str(tmp_path / "weights"))


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        ("OSError(28, 'No space left on device')", OSError, "No space left on device"),
        ("OSError(30, 'Read-only file system', '/c/x')", OSError, "Read-only file system: '/c/x'"),
        ("ValueError('a model')", PassFailed, "what was built does not run: ValueError: a model"),
    ],
)
def test_what_a_disk_does_to_a_measurement_is_not_the_models_fault(
    monkeypatch: pytest.MonkeyPatch, raised: str, kind: type[Exception], text: str
) -> None:
    monkeypatch.setattr(child, "command", lambda *_: [sys.executable, "-c", f"raise {raised}"])
    with pytest.raises(kind, match=text):
        in_fresh_process("measure")


def test_a_graph_that_never_ends_is_given_up(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_trial, "TRIAL_S", 2.0)
    _save_loop(tmp_path / "loop.onnx", 2**62)
    (tmp_path / "leanserve.yaml").write_text("base: {onnx: loop.onnx}\n" + VARIANTS)
    _is_one_line(*run("check", "--config", "leanserve.yaml"), "it does not answer a few rows within 2 s")


def test_a_graph_that_wants_all_memory_is_refused(run: Run, tmp_path: Path) -> None:
    shape = helper.make_tensor("s", TensorProto.INT64, [1], [2**40])
    one = helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["z"], value=one),
        helper.make_node("ReduceSum", ["z"], ["r"], keepdims=0),
        helper.make_node("Mul", ["x", "r"], ["y"]),
    ]
    _save(tmp_path / "memory.onnx", nodes, [shape])
    (tmp_path / "leanserve.yaml").write_text("base: {onnx: memory.onnx}\n" + VARIANTS)
    _is_one_line(*run("check", "--config", "leanserve.yaml"), "Failed to allocate memory")


def _save_loop(path: Path, turns: int) -> None:
    value, kind = helper.make_tensor_value_info, TensorProto
    nodes = [helper.make_node("Identity", ["c"], ["again"]), helper.make_node("Add", ["v", "v"], ["sum"])]
    inputs = [value("i", kind.INT64, []), value("c", kind.BOOL, []), value("v", kind.FLOAT, None)]
    body = helper.make_graph(nodes, "body", inputs, [value("again", kind.BOOL, []), value("sum", kind.FLOAT, None)])
    constants = [helper.make_tensor("n", kind.INT64, [], [turns]), helper.make_tensor("on", kind.BOOL, [], [True])]
    _save(path, [helper.make_node("Loop", ["n", "on", "x"], ["y"], body=body)], constants)


def _save(path: Path, nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto]) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
