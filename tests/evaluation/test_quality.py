"""Measuring: every output counts, and what is lost against the base is known with its interval."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from pydantic import BaseModel
from rich.console import Console

from leanserve.artifacts.manifest import Recipe
from leanserve.artifacts.store import ArtifactStore, checksums
from leanserve.bases.loaded import LoadedBase
from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.build.builder import Builder
from leanserve.build.progress import BuildProgress
from leanserve.context import AppContext
from leanserve.contracts import Array, ArrayData, Arrays, Base, ModelSpec, Result
from leanserve.errors import ArtifactCorrupt
from leanserve.evaluation.measure import outputs_on
from leanserve.evaluation.quality import GateOutputs, lost, measure, scored
from leanserve.hardware import this_hardware
from leanserve.scoring import ACCURACY, accuracy
from report_samples import artifact

FIRST, SECOND = (np.random.default_rng(seed).standard_normal((4, 3)).astype(np.float32) for seed in (1, 2))


@dataclass(frozen=True)
class Scored:
    """What `scored` asks of a base."""

    spec: ModelSpec
    score: Callable[[Arrays, Array], float]
    unit: int = 1
    scored_as: str = "own"


def interval(base: Scored, outputs: Array, labels: Array) -> tuple[float, float]:
    found = scored(cast(Base, base), GateOutputs((outputs,), labels))
    low, high = found["score_low"], found["score_high"]
    assert low is not None
    assert high is not None
    return low, high


@pytest.mark.parametrize(("right", "low", "high"), [(8, 0.4902, 0.9433), (0, 0.0, 0.2775), (10, 0.7225, 1.0)])
def test_an_accuracy_has_the_interval_of_wilson(right: int, low: float, high: float) -> None:
    base = Scored(ModelSpec((), (), ("no", "yes")), accuracy, scored_as=ACCURACY)
    outputs = np.eye(2)[[1] * right + [0] * (10 - right)]
    assert interval(base, outputs, np.ones(10, int)) == pytest.approx((low, high), abs=1e-4)


def test_any_other_score_has_the_interval_of_a_bootstrap_over_what_is_scored_together() -> None:
    def mean(outputs: Arrays, labels: Array) -> float:
        assert (outputs[0][::2] == -outputs[0][1::2]).all(), "a pair was torn"
        return float(outputs[0][::2].mean())

    drawn = np.random.default_rng(0).standard_normal(400)
    pairs = np.stack([drawn, -drawn], axis=1).ravel()
    base = Scored(ModelSpec((), ()), mean, unit=2)
    low, high = interval(base, pairs, pairs)
    assert (low + high) / 2 == pytest.approx(drawn.mean(), abs=0.02)
    assert high - low == pytest.approx(2 * 1.96 * drawn.std() / 20, rel=0.1)
    assert interval(base, pairs, pairs) == (low, high), "the same draws every time"
    assert interval(base, pairs[:2], pairs[:2]) == (drawn[0], drawn[0])


# Measured on real artifacts


def network(folder: Path, first: float, second: float) -> None:
    """Two regressions of the same row, each times a factor."""
    weights = [numpy_helper.from_array(FIRST * first, "w1"), numpy_helper.from_array(SECOND * second, "w2")]
    nodes = [helper.make_node("MatMul", ["x", f"w{index}"], [name]) for index, name in ((1, "price"), (2, "boxes"))]
    tensor = helper.make_tensor_value_info
    outputs = [tensor(name, 1, ["rows", 3]) for name in ("price", "boxes")]
    graph = helper.make_graph(nodes, "two", [tensor("x", 1, ["rows", 4])], outputs, weights)
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), folder / "model.onnx")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> LoadedBase:
    folder = tmp_path_factory.mktemp("base")
    network(folder, 1, 1)
    rows = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
    np.savez(folder / "rows.npz", x=rows, y=rows @ FIRST * 0.5)
    declared = {"arrays": "rows.npz", "labels": "y", "splits": {"gate": 40, "calibration": 8}}
    section = {"onnx": "model.onnx", "outputs": {"boxes": "embedding"}}
    made = open_base(Origin.model_validate({"base": section, "data": declared, "folder": folder}))
    assert [item.meaning for item in made.spec.outputs] == ["values", "embedding"]
    return made


def published(store: ArtifactStore, spec: ModelSpec, key: str, first: float, second: float) -> Recipe:
    with store.workspace(key) as folder:
        network(folder, first, second)
        recipe = Recipe(
            key=key, parents=(), base="two", kind=None, options={}, decisions={}, facts={}, simulated=False,
            format="onnx", spec=spec, files=checksums(folder), parameters=24, macs=24, seconds=0.0, versions={},
            hardware=this_hardware(),
        )  # fmt: skip
        store.publish(folder, recipe)
    return recipe


def test_a_variant_is_judged_by_its_worst_output_and_by_its_labels(tmp_path: Path, base: LoadedBase) -> None:
    store = ArtifactStore(tmp_path / "store")
    whole, answers = measure(store, base, published(store, base.spec, "a" * 64, 1, 1), None, this_hardware(1))
    assert whole.fidelity.agreement == 1.0
    poor, _ = measure(store, base, published(store, base.spec, "b" * 64, 1.7, -1), answers, this_hardware(1))
    price, boxes = poor.fidelity.outputs
    assert price.error == pytest.approx(0.7, abs=0.05)
    assert boxes.cosine == pytest.approx(-1)
    assert (boxes.agreement, poor.fidelity.agreement) == (0.0, 0.0)
    # The labels are half of the first output: its R squared is 1 - Var(y) / Var(y), and with 1.7 as factor 1 - 2.4^2.
    assert whole.fidelity.score == pytest.approx(0.0, abs=0.1)
    assert poor.fidelity.score == pytest.approx(1 - 2.4**2, abs=0.5)
    assert (poor.fidelity.score_low or 0) < (poor.fidelity.score or 0) < (poor.fidelity.score_high or 0)
    store.attach("b" * 64, poor)
    assert store.measurement("b" * 64) == poor


def test_a_measurement_of_an_older_version_is_made_again(tmp_path: Path, base: LoadedBase) -> None:
    store = ArtifactStore(tmp_path / "store")
    published(store, base.spec, "a" * 64, 1, 1)

    class Older(BaseModel):
        fidelity: dict[str, Any]
        cpu: str = "x"
        threads: int = 1

    known = artifact().quality.model_dump(exclude={"outputs", "latency_ms", "throughput"})
    store.attach("a" * 64, Older(fidelity=known | {"kl": None, "cosine": 1.0}))  # type: ignore[arg-type]
    assert (store.folder("a" * 64) / "quality.json").exists()
    with pytest.raises(ArtifactCorrupt, match="another version"):  # by which the builder measures again
        store.measurement("a" * 64)


TOLD = """
import ctypes
import torch

INPUTS = ({"name": "x", "dtype": "float32", "shape": (4,)},)

class Told(torch.nn.Module):
    def forward(self, x):
        read = ctypes.CDLL(None).getenv
        read.restype = ctypes.c_char_p
        return x[:, :1] * 0 + float(read(b"OMP_WAIT_POLICY") == b"passive")
"""


def test_threads_wait_asleep_for_each_other_where_nothing_is_timed(tmp_path: Path) -> None:
    (tmp_path / "told.py").write_text(TOLD)
    (tmp_path / "c.yaml").write_text("base: {python: 'told:Told'}\ndata: {synthetic: 8}\nvariants: [{name: float}]\n")
    context = AppContext(tmp_path / "c.yaml", tmp_path / "cache")
    [(_, steps)] = context.plan.recipes
    progress = BuildProgress(Console(), 0)
    recipe = Builder(context.store, context.config, context.base, context.hardware, progress).make(steps[0])
    _, answers = measure(context.store, context.base, recipe, None, context.hardware)
    assert (answers.outputs[0] == 1).all()


def test_outputs_of_batches_of_different_lengths_are_filled_up() -> None:
    class Echo:
        def run(self, batch: Arrays) -> Result:
            length = int(batch[0][0, 0])
            return Result((np.ones((len(batch[0]), length), np.float32), np.ones((len(batch[0]), length), np.int64)))

    data = ArrayData((np.array([[2], [2], [3]]),))
    floats, whole = outputs_on(Echo(), data, size=2)  # type: ignore[arg-type]
    np.testing.assert_array_equal(floats, [[1, 1, np.nan], [1, 1, np.nan], [1, 1, 1]])
    np.testing.assert_array_equal(whole, [[1, 1, 0], [1, 1, 0], [1, 1, 1]])


def test_a_regression_has_an_interval_around_its_score(base: LoadedBase) -> None:
    labels = np.random.default_rng(0).standard_normal((80, 3))
    noisy = (labels + 0.5 * np.random.default_rng(1).standard_normal((80, 3))).astype(np.float32)
    found = scored(base, GateOutputs((noisy, noisy), labels))
    assert found["score"] == pytest.approx(0.75, abs=0.1)
    low, high = found["score_low"], found["score_high"]
    assert low is not None
    assert high is not None
    assert 0.6 < low < 0.75 < high < 0.85


# What is lost


def test_a_loss_is_taken_from_the_rows_on_which_two_models_differ() -> None:
    base = Scored(ModelSpec((), (), ("no", "yes")), accuracy, scored_as=ACCURACY)
    labels, answers = np.ones(50, int), np.eye(2)
    theirs = answers[[1] * 48 + [0] * 2]
    ours = answers[[1] * 36 + [0] * 12 + [1] * 2]
    found = lost(cast(Base, base), GateOutputs((ours,), labels), GateOutputs((theirs,), labels))
    assert found["drop"] == pytest.approx(0.2)
    # Newcombe (1998), table II: 36, 12, 2 and 0 pairs; his method 10 gives 0.0569 to 0.3404.
    assert (found["drop_low"], found["drop_high"]) == pytest.approx((0.0569, 0.3404), abs=1e-4)


def test_nothing_is_lost_by_the_same_answers_and_little_is_known_from_few_rows() -> None:
    base = Scored(ModelSpec((), (), ("no", "yes")), accuracy, scored_as=ACCURACY)
    labels, answers = np.ones(20, int), np.eye(2)[[1] * 20]

    def drop_of(ours: Array) -> tuple[float | None, ...]:
        found = lost(cast(Base, base), GateOutputs((ours,), labels), GateOutputs((answers,), labels))
        return found["drop"], found["drop_low"], found["drop_high"]

    assert drop_of(answers) == (0.0, 0.0, 0.0)
    drop, low, high = drop_of(answers * 0.9)
    assert drop == 0.0
    assert low == pytest.approx(-0.161, abs=0.001), "20 rows of 20 may be 84 % of all"
    assert high == pytest.approx(0.161, abs=0.001)


def test_any_other_score_is_drawn_for_both_on_the_same_rows() -> None:
    drawn, noise = (np.random.default_rng(seed).standard_normal(400) for seed in (0, 1))
    base = Scored(ModelSpec((), ()), lambda outputs, _: float(outputs[0].mean()))
    ours, theirs = drawn - 0.1 + 0.01 * noise, drawn
    found = lost(cast(Base, base), GateOutputs((ours,), drawn), GateOutputs((theirs,), drawn))
    low, high = found["drop_low"], found["drop_high"]
    assert low is not None
    assert high is not None
    assert found["drop"] == pytest.approx(0.1, abs=0.002)
    assert high - low == pytest.approx(2 * 1.96 * 0.01 / 20, rel=0.15), "the spread of the rows themselves cancels"
    one = lost(cast(Base, base), GateOutputs((ours[:1],), drawn[:1]), GateOutputs((theirs[:1],), drawn[:1]))
    assert (one["drop_low"], one["drop_high"]) == (None, None), "of a single row nothing is known"
