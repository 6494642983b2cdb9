"""What enters a key: files that options name by their content, and of our own code what a pass imports, no more."""

from __future__ import annotations

import ast
import inspect
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import leanserve
from leanserve.build import cache_key
from leanserve.build.cache_key import steps_of
from leanserve.build.source_closure import closure_digest, source_closure
from leanserve.config.schema import ServiceConfig
from leanserve.config.variant_section import VariantConfig
from leanserve.contracts import Json
from leanserve.errors import ConfigError
from leanserve.hardware import Hardware, this_hardware
from leanserve.passes import ALL
from leanserve.passes.base import Pass
from leanserve.passes.families.runtime.fold_bn import FoldBn
from structural_nets import row_base

ROOT = Path(leanserve.__file__).parent
PRUNE = Path("passes/families/prune/prune_channels.py")


class Table(BaseModel):
    """Options within options."""

    file: Path


class Reading(FoldBn):
    """With options that name files: one, several, none, and one in a model of its own."""

    table: Path
    tables: tuple[Path, ...] = ()
    maybe: Path | None = None
    inner: Table | None = None
    named: Mapping[str, Path] = {}


def key_of(pass_: Pass) -> str:
    passes: Any = (pass_,)
    variant = VariantConfig.model_construct(name="v", passes=passes)
    config = ServiceConfig.model_validate({"base": "tiny", "variants": [{"name": "v"}]})
    return steps_of(config, row_base(), variant, this_hardware())[-1].key


@pytest.mark.parametrize("option", ["table", "tables", "maybe", "inner", "named"])
def test_a_file_that_an_option_names_enters_by_content(option: str, tmp_path: Path) -> None:
    def key(path: Path) -> str:
        value: Any = {"tables": [path], "inner": {"file": path}, "named": {"a": path}}.get(option, path)
        return key_of(Reading.model_validate({"table": fixed, option: value}))

    one, moved, fixed = tmp_path / "one", tmp_path / "moved", tmp_path / "fixed"
    fixed.write_text("always")
    for path in (one, moved):
        path.write_text("content")
    before = key(one)
    assert key(moved) == before, "where it lies decides nothing"
    one.write_text("other content")
    assert key(one) != before
    one.unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*one"):
        key(one)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of our source."""
    return Path(shutil.copytree(ROOT, tmp_path / "leanserve", ignore=shutil.ignore_patterns("__pycache__")))


def edited(tree: Path, file: str) -> dict[str, bool]:
    """Which passes have another digest once `file` has another line; each read by a process of its own."""
    digests = [_digests(tree)]
    with (tree / file).open("a") as stream:
        stream.write("\n# edited\n")
    digests.append(_digests(tree))
    return {name: digests[0][name] != digests[1][name] for name in digests[0]}


def _digests(tree: Path) -> dict[str, str]:
    script = (
        "import sys; from pathlib import Path; from leanserve.build.source_closure import closure_digest\n"
        "root = Path(sys.argv[1])\n"
        "for file in sorted(root.glob('passes/families/*/[a-z]*.py')): print(file.stem, closure_digest(file, root))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tree)], capture_output=True, text=True, check=True)
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("file", "changed", "kept"),
    [
        ("passes/toolkit/lowering.py", {"onnxruntime", "quantize_static"}, {"prune_channels", "distill", "cast"}),
        ("passes/toolkit/channels.py", {"prune_channels"}, {"lowrank_conv", "distill", "onnxruntime"}),
        ("passes/toolkit/training.py", {"distill", "prune_channels"}, {"fold_bn", "quantize_dynamic", "torch_compile"}),
        ("passes/families/runtime/fold_bn.py", {"fold_bn"}, {"channels_last", "onnxruntime", "cast"}),
        ("passes/base.py", {"fold_bn", "distill", "torch_compile"}, set()),
        ("passes/__init__.py", set(), {"fold_bn", "distill", "prune_channels"}),
        ("serving/scheduler.py", set(), {"fold_bn", "onnxruntime", "torch_compile"}),
    ],
)
def test_an_edit_changes_the_keys_of_what_imports_the_file(
    file: str, changed: set[str], kept: set[str], tree: Path
) -> None:
    found = edited(tree, file)
    assert {name for name in changed | kept if found[name]} == changed


def test_imports_inside_functions_count_and_those_for_type_checkers_do_not(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    for name in ("top", "lazy", "many", "typed", "behind", "left_out"):
        (tmp_path / "tools" / f"{name}.py").touch()
    (tmp_path / "tools" / "__init__.py").touch()
    (tmp_path / "tools" / "top.py").write_text("def f():\n    from leanserve.tools.behind import g\n    return g\n")
    (tmp_path / "pass.py").write_text(
        "from typing import TYPE_CHECKING\n\n"
        "from leanserve.tools.top import f\n\n"
        "if TYPE_CHECKING:\n    import torch\n\n    from leanserve.tools.typed import Type\n\n"
        "def apply():\n    import leanserve.tools.lazy\n    from leanserve.tools import (\n        many,\n    )\n"
    )
    found = source_closure(tmp_path / "pass.py", tmp_path)
    assert {path.stem for path in found} == {"pass", "top", "behind", "lazy", "many"}


def imported(node: ast.AST) -> Iterator[str]:
    """Modules of ours in a whole syntax tree, blocks for type checkers left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.ImportFrom) and child.module and child.module.startswith("leanserve"):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name.startswith("leanserve"))
        yield from imported(child)


def file_of(module: str) -> Path:
    name = module
    while name != "leanserve":
        path = ROOT.joinpath(*name.split(".")[1:])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
        name = name.rpartition(".")[0]
    return ROOT / "__init__.py"


@pytest.mark.parametrize("pass_", ALL, ids=lambda pass_: pass_.__name__)
def test_reading_import_statements_alone_finds_what_whole_syntax_trees_say(pass_: type[Pass]) -> None:
    own = Path(inspect.getfile(pass_))
    found, waiting = {own}, [own]
    while waiting:
        files = set(map(file_of, imported(ast.parse(waiting.pop().read_text())))) - found
        found |= files
        waiting += files
    assert source_closure(own, ROOT) == found
    assert len(found) > 3


def test_the_digest_does_not_depend_on_where_the_source_lies(tree: Path) -> None:
    assert closure_digest(tree / PRUNE, tree) == closure_digest(ROOT / PRUNE, ROOT)


def test_the_digest_of_the_closure_decides_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(FoldBn())
    assert key_of(FoldBn()) == before
    monkeypatch.setattr(cache_key, "closure_digest", lambda *_: "another")
    assert key_of(FoldBn()) != before


def test_a_key_depends_on_the_hardware_where_the_result_does() -> None:
    def key_on(passes: list[Json], *isa: str) -> str:
        config = ServiceConfig.model_validate({"base": "x", "variants": [{"name": "v", "passes": passes}]})
        return steps_of(config, row_base(), config.variants[0], Hardware("a processor", 2, isa))[-1].key

    bound: list[Json] = [{"kind": "quantize_dynamic"}]
    assert key_on(bound, "avx2") != key_on(bound, "avx2", "avx512_vnni"), "7 or 8 bits"
    assert key_on([{"kind": "fold_bn"}], "avx2") == key_on([{"kind": "fold_bn"}], "avx2", "avx512_vnni")
