"""Every pass in `ALL` keeps its contract: stored and loaded again it is the same model, and its input is untouched."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from builds import constructed, measure_nothing
from leanserve.artifacts.load import load_model
from leanserve.artifacts.store import ArtifactStore
from leanserve.build.cache_key import steps_of
from leanserve.config.errors import KINDS
from leanserve.config.schema import ServiceConfig
from leanserve.config.variant_section import GateConfig
from leanserve.contracts import Arrays, Model, Share, TensorSpec
from leanserve.errors import PassFailed
from leanserve.evaluation.fidelity import fidelity
from leanserve.hardware import this_hardware
from leanserve.passes import AnyPass
from leanserve.passes.base import Pass
from leanserve.runtime.formats import open_backend
from pass_cases import BEFORE, CASES
from stacked_nets import stacked_base
from structural_nets import Residual, image_base, row_base
from tiny_base import TinyBase

PASS: TypeAdapter[Pass] = TypeAdapter(AnyPass)
Result = TypeVar("Result")
LINEAR = {"lowrank_linear", "smooth", "quantize_dynamic", "quantize_weights"}

COMPILED = frozenset({"torch_compile", "aot_inductor"})
"""Built by a C++ compiler, which takes half a minute."""


def base_for(kind: str) -> TinyBase:
    if kind in {"prune_layers", "prune_heads", "distill_features"}:
        return stacked_base()
    return row_base() if kind in LINEAR else image_base(Residual())


def config_of(*chains: list[Mapping[str, Any]]) -> ServiceConfig:
    variants = [{"name": f"v{index}", "passes": passes} for index, passes in enumerate(chains)]
    return ServiceConfig.model_validate({"base": "tiny", "variants": variants})


def variant_of(kind: str) -> ServiceConfig:
    """Its last variant has the pass as its last; what a joining pass joins is the base and a student of it."""
    step = {"kind": kind, **CASES[kind][0]}
    if not PASS.validate_python(step).joins:
        return config_of([*BEFORE.get(kind, ()), step])
    variants = [
        {"name": "teacher"},
        {"name": "student", "passes": [{"kind": "distill", **CASES["distill"][0]}]},
        {"name": "joined", "parents": ["teacher", "student"], "passes": [step]},
    ]
    return ServiceConfig.model_validate({"base": "tiny", "variants": variants})


def outputs(model: Callable[[], Model], batch: Arrays, *, alone: bool = False) -> Arrays:
    """Answers on a thread of their own, as on a device; `alone` runs every row by itself."""

    def run() -> Arrays:
        backend = open_backend(model(), Share(1))
        if not alone:
            return backend.run(batch).outputs
        rows = [backend.run(tuple(array[row : row + 1] for array in batch)).outputs for row in range(len(batch[0]))]
        return tuple(np.concatenate(parts) for parts in zip(*rows, strict=True))

    found: list[Arrays] = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    return found[0]


class Built(NamedTuple):
    """A case: what it was built of, and with which keys."""

    base: TinyBase
    config: ServiceConfig
    weights: Mapping[str, torch.Tensor]
    """Of the base before."""
    store: ArtifactStore
    keys: list[list[str]]


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """A case of a pass in a store, built when it is asked for first; skips those that nothing here can run."""

    @cache
    def build(kind: str) -> Built:
        base, config = base_for(kind), variant_of(kind)
        weights = {name: tensor.clone() for name, tensor in base.teacher.state_dict().items()}
        store = ArtifactStore(tmp_path_factory.mktemp(kind))
        return Built(base, config, weights, store, constructed(store, config, base)[0])

    def found(kind: str) -> Built:
        if reason := variant_of(kind).variants[-1].passes[-1].unsupported_reason(this_hardware()):
            pytest.skip(reason)
        return build(kind)

    return found


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_nothing(monkeypatch)


def test_every_pass_has_a_case() -> None:
    assert set(CASES) == set(KINDS)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.soak] if kind in COMPILED else []) for kind in CASES]
)
def test_built_stored_and_loaded_it_answers_like_the_base(kind: str, built_once: Callable[[str], Built]) -> None:
    _, least_cosine = CASES[kind]
    base, _, weights, store, (*_, (base_key, *_, key)) = built_once(kind)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.teacher.state_dict().items())
    batch = tuple(array[:8] for array in base.inputs)
    ours = outputs(lambda: load_model(store, base, key), batch)
    theirs = outputs(lambda: load_model(store, base, base_key), batch)
    assert [array.shape for array in ours] == [array.shape for array in theirs]
    assert [array.dtype for array in ours] == [array.dtype for array in theirs]
    [near] = fidelity(ours, theirs, (TensorSpec("answers", "float32", (10,), meaning="embedding"),))
    assert near.agreement >= least_cosine
    alone = outputs(lambda: load_model(store, base, key), batch, alone=True)
    # Batched == single, up to rounding. Dynamic quantization scales by the largest activation of the whole batch.
    tolerance = {"cast": 3e-2, "quantize_dynamic": 0.5}.get(kind, 1e-4)
    np.testing.assert_allclose(ours[0], alone[0], rtol=1e-6, atol=tolerance)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.soak] if kind == "qat" else []) for kind in CASES if kind not in COMPILED],
)
def test_the_same_input_makes_the_same_artifact(kind: str, built_once: Callable[[str], Built], tmp_path: Path) -> None:
    base, config, _, first, keys = built_once(kind)
    second = ArtifactStore(tmp_path)
    assert constructed(second, config, base)[0] == keys
    recipes = [store.recipe(keys[-1][-1]) for store in (first, second)]
    assert recipes[0] is not None
    assert recipes[1] is not None
    assert recipes[0].files == recipes[1].files


def test_shared_prefixes_are_built_once_and_a_second_build_makes_nothing(tmp_path: Path) -> None:
    base = image_base(Residual())
    fold = {"kind": "fold_bn"}
    config = config_of([], [fold], [fold, {"kind": "channels_last"}], [fold, {"kind": "onnxruntime"}])
    store = ArtifactStore(tmp_path)
    keys, said = constructed(store, config, base)
    assert len({key for chain in keys for key in chain}) == 4
    assert said.count("fold_bn:") == 1
    stamps = {path: path.stat().st_mtime_ns for path in store.root.glob("artifacts/*/manifest.json")}
    constructed(store, config, base)
    assert stamps == {path: path.stat().st_mtime_ns for path in store.root.glob("artifacts/*/manifest.json")}


@pytest.mark.parametrize("change", ["option", "seed", "data", "parent"])
def test_what_decides_an_artifact_decides_its_key(change: str) -> None:
    def key(base: TinyBase, seed: int, rank: float, *before: Mapping[str, Any]) -> str:
        config = config_of([*before, {"kind": "lowrank_conv", "energy": rank}]).model_copy(update={"seed": seed})
        chain = steps_of(config, base, config.variants[0], this_hardware())
        return chain[-1].key

    base = row_base()
    usual = key(base, 0, 0.9)
    assert usual == key(row_base(), 0, 0.9)
    other = {
        "option": lambda: key(base, 0, 0.8),
        "seed": lambda: key(base, 1, 0.9),
        "data": lambda: key(TinyBase(base.teacher, base.inputs, base.labels, base.spec, digest="1"), 0, 0.9),
        "parent": lambda: key(base, 0, 0.9, {"kind": "prune_channels", "ratio": 0.5}),
    }[change]()
    assert other != usual


def test_a_failing_pass_names_variant_position_and_option(tmp_path: Path) -> None:
    config = config_of([{"kind": "quantize_static", "keep_float": ["nothing-like-it"]}])
    config = config.model_copy(update={"gate": GateConfig(on_fail="abort")})
    with pytest.raises(PassFailed, match=r"variant 'v0', pass 1 \(quantize_static\): .*keep_float"):
        constructed(ArtifactStore(tmp_path), config, image_base(Residual()))


@pytest.mark.parametrize("kind", CASES)
def test_a_pass_that_asks_how_good_candidates_are_says_so(kind: str) -> None:
    """The score decides what it makes, and so is part of its key."""
    pass_ = KINDS[kind]
    asks = "context.evaluate" in Path(inspect.getfile(pass_)).read_text(encoding="utf-8")
    assert asks == (pass_.evaluates is not Pass.evaluates)
