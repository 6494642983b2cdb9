"""Rooms and floors: a file imports only from lower layers, read from the syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# The first match counts; see docs/decisions for why the tools of passes have a layer of their own.
LAYERS: tuple[tuple[str, int], ...] = (
    ("leanserve.errors", 0),
    ("leanserve.contracts", 0),
    ("leanserve.comparison", 0),
    ("leanserve.disk", 0),
    ("leanserve.artifacts.sealed", 1),
    ("leanserve.hardware", 0),
    ("leanserve.config.yaml", 1),
    ("leanserve.config.section", 0),
    ("leanserve.telemetry.observations", 1),
    ("leanserve.telemetry.startup", 1),
    ("leanserve.telemetry.metrics", 2),
    ("leanserve.codecs", 1),
    ("leanserve.bases.opening", 4),
    ("leanserve.bases.sources", 3),
    ("leanserve.bases.datasets", 3),
    ("leanserve.bases", 2),
    ("leanserve.passes.base", 1),
    ("leanserve.passes.toolkit", 2),
    ("leanserve.passes.composition", 4),
    ("leanserve.passes", 3),
    ("leanserve.artifacts.manifest", 1),
    ("leanserve.config.errors", 4),
    ("leanserve.config.schema", 5),
    ("leanserve.runtime.backends", 6),
    ("leanserve.serving.batcher", 6),
    ("leanserve.runtime.assembly", 1),
    ("leanserve.runtime.costs", 6),
    ("leanserve.runtime.device", 6),
    ("leanserve.evaluation", 7),
    ("leanserve.serving", 8),
    ("leanserve.bench", 9),
    ("leanserve.init", 9),
    ("leanserve.api", 9),
    ("leanserve.context", 10),
    ("leanserve.start", 11),
    ("leanserve.__main__", 12),
    ("service", 0),
)
ONLY = {
    "prometheus_client": {"service/leanserve/telemetry/metrics.py"},
    "fastapi": {"service/leanserve/api/app.py"},
    "uvicorn": {"service/leanserve/http/connection.py", "service/leanserve/api/server.py"},
    "grpc": {"service/leanserve/api/v2/grpc_server.py"},
    "typer": {"service/leanserve/__main__.py"},
}
LAZY = {
    "torch",
    "torchao",
    "torch_pruning",
    "onnx",
    "onnxruntime",
    "openvino",
    "timm",
    "torchvision",
    "transformers",
    "optuna",
    "ray",
    "matplotlib",
}
MAY_IMPORT_AT_TOP = (
    "service/leanserve/runtime/backends/",
    "service/leanserve/bases/modules/",
    "service/leanserve/passes/toolkit/",
)


def files(*tops: str) -> list[Path]:
    return [path for top in tops for path in sorted((ROOT / top).rglob("*.py"))]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def layer_of(module: str) -> int:
    return next(layer for prefix, layer in LAYERS if module == prefix or module.startswith(prefix + "."))


def imports(tree: ast.Module, *, top_level: bool) -> Iterator[str]:
    """Imported modules; type-checking blocks are no imports."""
    for node in _walk(tree, top_level=top_level):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            yield node.module


def _walk(node: ast.AST, *, top_level: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if top_level and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        yield child
        yield from _walk(child, top_level=top_level)


@pytest.mark.parametrize("path", files("service"), ids=name_of)
def test_a_file_imports_only_from_lower_layers(path: Path) -> None:
    tree = ast.parse(path.read_text())
    own = layer_of(name_of(path))
    for module in imports(tree, top_level=False):
        if module == "service" or not module.startswith("service."):
            continue
        # Within a package, files may use each other, and the package's own file its contents.
        package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
        same_package = module == package or module.startswith(package + ".")
        assert layer_of(module) < own or (same_package and layer_of(module) == own), f"{module} is not below"


@pytest.mark.parametrize("path", files("service", "models"), ids=name_of)
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    tree = ast.parse(path.read_text())
    roots = {module.partition(".")[0] for module in imports(tree, top_level=False)}
    for library, allowed in ONLY.items():
        assert library not in roots or relative in allowed, f"{library} belongs in {allowed}"
    if relative.startswith("service/") and not relative.startswith(MAY_IMPORT_AT_TOP):
        eager = {module.partition(".")[0] for module in imports(tree, top_level=True)} & LAZY
        assert not eager, f"{eager} must be imported where it is needed"
    if relative.startswith("models/"):
        assert "service" not in roots
    assert path.name not in {"utils.py", "util.py", "helpers.py", "common.py"}


@pytest.mark.parametrize("path", files("service/leanserve/passes"), ids=name_of)
def test_a_pass_imports_no_other_pass(path: Path) -> None:
    if path.name in {"__init__.py", "composition.py"}:
        return
    for module in imports(ast.parse(path.read_text()), top_level=False):
        assert not module.startswith("leanserve.passes") or module == "leanserve.passes.base"
