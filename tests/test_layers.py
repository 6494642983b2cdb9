"""The house plan, held against the code: a package imports only from lower layers, read from the syntax trees."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SERVICE, MODELS = ROOT / "service" / "leanserve", ROOT / "models" / "leanserve_models"
LAYERS = {
    "child": 0,
    "comparison": 0,
    "contracts": 0,
    "disk": 0,
    "errors": 0,
    "hardware": 0,
    "memory": 0,
    "privacy": 0,
    "request_identity": 0,
    "texts": 0,
    "scoring": 0,
    "timing": 0,
    "token_bucket": 0,
    "codecs": 1,
    "runtime": 1,
    "telemetry": 1,
    "http": 1,
    "passes": 2,
    "serving": 2,
    "experiments": 2,
    "config": 3,
    "artifacts": 3,
    "bases": 4,
    "live": 4,
    "report": 4,
    "api": 5,
    "evaluation": 5,
    "worker": 5,
    "build": 6,
    "context": 7,
    "start": 8,
    "init": 8,
    "bench": 8,
    "experiment_client": 8,
    "export": 8,
    "upkeep": 8,
    "__main__": 9,
}
"""One row per package: it imports from packages with a smaller number, and from itself; files of row 0 also from each
other."""
ONLY = {
    "prometheus_client": {"telemetry"},
    "fastapi": {"api"},
    "uvicorn": {"api", "http"},
    "grpc": {"api"},
    "typer": {"__main__"},
}
"""Libraries that belong to these packages alone."""
LAZY = {
    "matplotlib",
    "nncf",
    "onnx",
    "onnxruntime",
    "openvino",
    "optuna",
    "ray",
    "scipy",
    "soundfile",
    "soxr",
    "timm",
    "torch",
    "torch_pruning",
    "torchao",
    "torchvision",
    "transformers",
}
MAY_IMPORT_AT_TOP = (
    "bases/modules/",
    "passes/toolkit/",
    "runtime/backends/",
    "runtime/cuda/card.py",
    "runtime/cuda/stream_lane.py",
    "runtime/formats/packaged_module.py",
    "runtime/formats/tied_tensors.py",
    "runtime/formats/torch_masks.py",
    "runtime/formats/torch_storage.py",
    "runtime/formats/torch_size.py",
    "runtime/linux/spin_control.py",
    "runtime/onnx_arena.py",
)
"""Files that are themselves imported only where they are needed."""
NEVER = {"utils.py", "util.py", "helpers.py", "common.py"}
READERS_OF_THE_ENVIRONMENT = ("__main__", "bench", "context", "init", "privacy")
CONSTRUCTORS = {
    "str",
    "cache",
    "AfterValidator",
    "audio_types",
    "BeforeValidator",
    "column",
    "Column",
    "compile",
    "Console",
    "ContextVar",
    "Discriminator",
    "escape",
    "Field",
    "findall",
    "finfo",
    "float",
    "fromkeys",
    "frozenset",
    "geomspace",
    "get_args",
    "get_path",
    "getLogger",
    "isnan",
    "items",
    "join",
    "keys",
    "map",
    "MappingProxyType",
    "media_types",
    "memoryview",
    "namedtuple",
    "Option",
    "partial",
    "Path",
    "queue_requests",
    "queue_rows",
    "radians",
    "range",
    "resolve",
    "round",
    "Shipped",
    "sorted",
    "split",
    "Struct",
    "Tag",
    "Tensor",
    "tuple",
    "type",
    "TypeAdapter",
    "Typer",
    "TypeVar",
    "TypeVarTuple",
    "uint64",
    "upper",
    "values",
    "short_for",
    "told_by_key",
}
"""What may be called at import: makes a constant, and touches nothing outside the module. A `ContextVar` is a name for
what tasks hold; it holds nothing itself."""


def files(*tops: Path) -> list[Path]:
    return [path for top in tops for path in sorted(top.rglob("*.py"))]


def name_of(path: Path) -> str:
    top = SERVICE if path.is_relative_to(SERVICE) else MODELS
    return ".".join(path.relative_to(top.parent).with_suffix("").parts).removesuffix(".__init__")


def package_of(module: str) -> str:
    """The package, or single file, of `leanserve` that a module belongs to."""
    return [*module.split("."), ""][1]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(tree: ast.Module, *, top_level: bool = False) -> Iterator[str]:
    """Imported modules; blocks for type checkers are none."""
    for node in _walk(tree, top_level=top_level):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _walk(node: ast.AST, *, top_level: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if top_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield child
        yield from _walk(child, top_level=top_level)


@pytest.mark.parametrize("path", files(SERVICE), ids=name_of)
def test_a_package_imports_only_from_lower_layers(path: Path) -> None:
    own = package_of(name_of(path))
    for module in imports(parsed(path)):
        other = package_of(module)
        if not module.startswith("leanserve.") or other in {own, "__version__"}:
            continue
        below = LAYERS[other] < LAYERS[own] or LAYERS[other] == LAYERS[own] == 0
        assert below, f"{module} is not below {own}"


def test_files_import_each_other_in_no_circle() -> None:
    """Not inside a package either, nor within functions, nor for type checkers alone."""
    known = {name_of(path): path for path in files(SERVICE, MODELS)}
    imported: dict[str, set[str]] = {}
    for name, path in known.items():
        nodes = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom) and node.module]
        wanted = {(node.module or "", alias.name) for node in nodes for alias in node.names}
        imported[name] = {f"{module}.{item}" if f"{module}.{item}" in known else module for module, item in wanted}
    TopologicalSorter({name: names & known.keys() for name, names in imported.items()}).prepare()  # else a CycleError


def test_every_package_has_its_row() -> None:
    found = {path.stem for path in SERVICE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__"} == set(LAYERS)


@pytest.mark.parametrize("path", files(SERVICE, MODELS), ids=name_of)
def test_libraries_stay_in_their_packages(path: Path) -> None:
    tree, own = parsed(path), package_of(name_of(path))
    roots = {module.partition(".")[0] for module in imports(tree)}
    if path.is_relative_to(MODELS):
        assert "leanserve" not in roots, "shipped models can be written and run alone"
        return
    for library, allowed in ONLY.items():
        assert library not in roots or own in allowed, f"{library} belongs to {allowed}"
    if not path.relative_to(SERVICE).as_posix().startswith(MAY_IMPORT_AT_TOP):
        eager = {module.partition(".")[0] for module in imports(tree, top_level=True)} & LAZY
        assert not eager, f"{eager} must be imported where it is needed"
    assert path.name not in NEVER


@pytest.mark.parametrize("path", files(SERVICE / "passes" / "families"), ids=name_of)
def test_a_pass_imports_no_other_pass(path: Path) -> None:
    for module in imports(parsed(path)):
        assert not module.startswith("leanserve.passes.families"), f"{module} is another pass"


@pytest.mark.parametrize("path", files(SERVICE / "passes"), ids=name_of)
def test_a_pass_knows_formats_but_nothing_that_runs_them(path: Path) -> None:
    for module in imports(parsed(path)):
        known = module.startswith("leanserve.runtime.formats.")
        assert known or not module.startswith("leanserve.runtime"), f"{module} is the runtime's own"


@pytest.mark.parametrize("path", files(SERVICE), ids=name_of)
def test_only_formats_ask_what_class_a_model_has(path: Path) -> None:
    """Everybody else goes by the name of its format, so that another format is a file and a row."""
    if path.parent == SERVICE / "runtime" / "formats":
        return
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            assert not {"TorchModel", "OnnxModel"} & set(ast.unparse(node.args[1]).split(" | ")), node.lineno


@pytest.mark.parametrize("path", files(SERVICE), ids=name_of)
def test_importing_a_module_does_nothing(path: Path) -> None:
    """No mutable state at module level, no side effect: constants, classes and functions only."""
    for node in parsed(path).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            names = [
                ast.unparse(target) for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            ]
            called = [item for item in ast.walk(node.value) if isinstance(item, ast.Call)]
            strange = {ast.unparse(item.func).rpartition(".")[2] for item in called} - CONSTRUCTORS - local_names(path)
            assert not strange, f"{names} calls {strange} at import"
            mutable = isinstance(node.value, ast.Dict | ast.List | ast.Set | ast.ListComp | ast.DictComp)
            assert not mutable or all(name.strip("_").isupper() for name in names), f"{names} is mutable state"
        elif isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant), f"line {node.lineno} is run at import"
        else:
            assert not isinstance(node, ast.For | ast.While | ast.With | ast.Global), f"line {node.lineno}"


def local_names(path: Path) -> set[str]:
    """Pure functions and classes of the module itself may make its constants."""
    return {node.name for node in parsed(path).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("path", files(SERVICE), ids=name_of)
def test_arguments_and_environment_are_read_at_the_top_only(path: Path) -> None:
    if package_of(name_of(path)) in READERS_OF_THE_ENVIRONMENT:
        return
    for node in ast.walk(parsed(path)):
        assert not (isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv"})


def test_public_names_are_unique() -> None:
    """One word, one thing: a reader who meets a name in two files may trust that it is the same."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in files(SERVICE):
        for node in parsed(path).body:
            for name in defined(node):
                if not name.startswith("_") and name not in {"logger", "main"} and not name.isupper():
                    found[name].add(name_of(path))
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    return []
